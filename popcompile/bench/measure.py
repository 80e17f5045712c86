"""Time to first token, decoding speed and memory of a package, of its own full model, and of what others made of it.

Every subject lives in a process of its own. For each prompt length all of them take turns, one at a time, while the
others wait; so what else the machine does, and how warm it is, meets all of them alike.

    pop     the package as it is
    full    the same model with nothing pruned and one row of logits: the fair baseline, compiled for the purpose
    DIR     what --against names

Where prompts have images, the vision tower is timed apart: nothing of it is pruned.
"""

from __future__ import annotations

import platform
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal

import numpy as np

from popcompile.bench.images import image_sizes, require_images
from popcompile.bench.process import WorkerProcess
from popcompile.bench.settings import BenchSettings
from popcompile.bench.subjects import Subject, find_peers, package_subject, require_runtime
from popcompile.errors import PopcompileError
from popcompile.export.providers import PROVIDERS
from popcompile.package.benchmark import Benchmark, Measure, Memory, PromptTimes, Ratio, SubjectResult, Timing
from popcompile.package.graph_check import check_package
from popcompile.package.manifest import Manifest, read_manifest
from popcompile.progress import Progress
from popcompile.runtime.gpu import gpu_name
from popcompile.runtime.providers import find_provider
from popcompile.variants import Variants

LENGTHS = (256, 1024, 2048)
_REST = 0.05  # seconds between turns, in which the last subject's threads stop spinning


def bench(
    folder: str | Path,
    against: Sequence[str | Path | Subject] = (),
    lengths: Sequence[int] = LENGTHS,
    batch: int = 1,
    decode_tokens: int = 32,
    repeats: int = 5,
    threads: int | None = None,
    provider: str = "cpu",
    runtime: str = "popcompile",
    seed: int = 0,
    progress: Progress | None = None,
    *,
    images: Sequence[str] = (),
    image_tokens: Sequence[int] = (),
) -> Benchmark:
    """Measure the package in `folder`, its full model, and the packages, decoders and checkpoints of `against`, where a
    Subject with a command brings a runtime of its own.

    lengths: of the prompts, in tokens; they are random ones, the same for all subjects, `batch` rows of each.
    decode_tokens: greedy steps after every prompt. repeats: turns that count, after one that warms up. threads: of
    every subject; None: the machine's cores. runtime: of packages, the full model's among them: popcompile's, or
    onnxruntime-genai, in which its model builder's folders run as well. images: picture files, and image_tokens: of
    images, how many tokens they have; such images, of noise, stand in every row of every prompt, beside its text.

    Returns what package/benchmark.py says.
    Raises PopcompileError for what cannot be measured, and where a process ends.
    """
    started, folder = time.perf_counter(), Path(folder)
    report = progress or (lambda step, done, total: None)
    settings = BenchSettings.of(
        lengths=lengths, batch=batch, decode_tokens=decode_tokens, repeats=repeats, threads=threads, provider=provider,
        runtime=runtime, seed=seed, images=[],
    )  # fmt: skip
    require_runtime(runtime)
    find_provider(provider)
    manifest = read_manifest(folder)
    settings = replace(settings, images=image_sizes(folder, manifest, images, image_tokens))
    pop = package_subject("pop", folder, runtime)
    peers = find_peers(pop, [path if isinstance(path, Subject) else Path(path) for path in against], runtime)
    check_package(folder, manifest)
    if settings.images:
        require_images([pop, *peers])
    for subject in (pop, *peers):
        settings.require_room(subject)
    with tempfile.TemporaryDirectory(prefix="popcompile-") as temporary, ExitStack() as stack:
        report("compile", 0, 1)
        full = package_subject("full", Variants(folder).prune(Path(temporary) / "full", []), runtime)
        workers = []
        for index, subject in enumerate((pop, full, *peers)):
            report("load", index, len(peers) + 2)
            workers.append(stack.enter_context(_Measured(subject)))
            with workers[-1].may_fail():
                workers[-1].load(settings)
        _take_turns(workers, settings, report)
    warnings = [worker.failure for worker in workers if worker.failure]
    workers = [worker for worker in workers if not worker.failure]
    subjects = [worker.result(settings) for worker in workers]
    subjects[1]["path"] = None  # it was compiled for the purpose
    return {
        "package": str(folder),
        "pruned": manifest.pruned,
        "num_layers": manifest.num_layers,
        "dtype": manifest.dtype,
        "source": manifest.source["name"],
        "settings": settings.to_json(),
        "versions": _versions(),
        "cpu": _cpu(),
        "gpu": gpu_name() if PROVIDERS[provider].gpu else None,
        "subjects": subjects,
        "ratios": _ratios(subjects),
        "warnings": warnings + _other_first_tokens(workers, manifest),
        "seconds": round(time.perf_counter() - started, 1),
    }


def _take_turns(workers: list[_Measured], settings: BenchSettings, report: Progress) -> None:
    """Every subject once, then again: the first time to warm up, the others to be timed."""
    lengths, turns = settings.lengths, settings.repeats + 1
    vocabulary = min(worker.subject.vocab_size for worker in workers)
    total, done = sum(lengths) * turns * len(workers), 0
    for length in lengths:
        generator = np.random.default_rng([settings.seed, length])
        ids = generator.integers(vocabulary, size=(settings.batch, length)).tolist()
        for turn in range(turns):
            for worker in workers:
                report("measure", done, total)
                if not worker.failure:
                    with worker.may_fail():
                        worker.turn(length, ids, settings.decode_tokens, warm_up=turn == 0)
                    time.sleep(_REST)
                done += length
    report("measure", done, total)


class _Measured(WorkerProcess):
    """A subject's process, and what was measured there; `failure`: why one is left out that is not required."""

    def __init__(self, subject: Subject) -> None:
        super().__init__(subject)
        self.failure = ""
        self.first_tokens: dict[int, list[int]] = {}  # by prompt length
        self._continuations: dict[int, list[list[int]]] = {}
        self._runtime: str | None = None
        self._turns: dict[int, list[dict[str, float]]] = {}
        self._memory = Memory(anonymous=None, peak=None)
        self._load_seconds = 0.0

    @contextmanager
    def may_fail(self) -> Iterator[None]:
        """What ends a required subject ends the benchmark; another is left out of it."""
        try:
            yield
        except PopcompileError as error:
            if self.subject.required:
                raise
            self.failure = str(error)

    def load(self, settings: BenchSettings) -> None:
        asked = {"provider": settings.provider, "threads": settings.threads, "images": settings.images}
        reply = self.ask({"load": self.subject.to_json(), **asked})
        self._load_seconds, self._runtime = reply["seconds"], reply.get("runtime")
        self._memory = Memory(anonymous=reply["anonymous"], peak=None)
        if PROVIDERS[settings.provider].gpu:
            self._memory["gpu"] = reply["gpu"]

    def turn(self, length: int, ids: list[list[int]], steps: int, *, warm_up: bool) -> None:
        """One prompt, ids [batch, length], and `steps` tokens after it."""
        if not warm_up:
            self._turns.setdefault(length, []).append(self.ask({"turn": ids, "steps": steps}))
            return
        reply = self.ask({"warm_up": ids, "steps": steps})
        self.first_tokens[length], self._continuations[length] = reply["first_token"], reply["tokens"]
        held: tuple[Literal["anonymous", "peak"], ...] = ("anonymous", "peak")
        for name in held:
            if reply[name] is not None:
                self._memory[name] = max(reply[name], self._memory[name] or 0)
        if "gpu" in self._memory:  # which ONNX Runtime keeps
            self._memory["gpu"] = (self._memory["gpu"] or 0) + reply["gpu"]

    def result(self, settings: BenchSettings) -> SubjectResult:
        return {
            "name": self.subject.name,
            "kind": self.subject.kind,
            "path": str(self.subject.path),
            "runtime": self._runtime,
            "load_seconds": self._load_seconds,
            "memory": self._memory,
            "lengths": [self._times(length, settings) for length in self._turns],
        }

    def _times(self, length: int, settings: BenchSettings) -> PromptTimes:
        prompt = length + settings.image_tokens

        def timing(measure: Measure, tokens: int) -> Timing:
            return _timing([turn[measure] for turn in self._turns[length]], tokens * settings.batch)

        times: PromptTimes = {
            "tokens": length,
            "first_token": self.first_tokens[length],
            "continuation": self._continuations[length],
            "prefill": timing("prefill", prompt),
            "time_to_first_token": timing("time_to_first_token", prompt),
            "decode": timing("decode", settings.decode_tokens),
        }
        if settings.images:
            times["vision"] = timing("vision", settings.image_tokens)
        return times


def _timing(seconds: list[float], tokens: int) -> Timing:
    median = statistics.median(seconds)
    half_spread = (max(seconds) - min(seconds)) / 2
    return {"seconds": seconds, "median": median, "half_spread": half_spread, "tokens_per_second": tokens / median}


def _ratios(subjects: list[SubjectResult]) -> list[Ratio]:
    pop, *others = subjects
    return [
        _ratio(ours, theirs, other["name"])
        for other in others
        for ours, theirs in zip(pop["lengths"], other["lengths"], strict=True)
    ]


def _ratio(ours: PromptTimes, theirs: PromptTimes, over: str) -> Ratio:
    ratio: Ratio = {
        "tokens": ours["tokens"],
        "over": over,
        "prefill": theirs["prefill"]["median"] / ours["prefill"]["median"],
        "time_to_first_token": theirs["time_to_first_token"]["median"] / ours["time_to_first_token"]["median"],
        "decode": theirs["decode"]["median"] / ours["decode"]["median"],
    }
    if "vision" in ours:
        ratio["vision"] = theirs["vision"]["median"] / ours["vision"]["median"]
    return ratio


def _other_first_tokens(workers: list[_Measured], manifest: Manifest) -> list[str]:
    """For each peer whose first token differs from the full model's: the shortest prompt where it does."""
    _, full, *peers = workers
    found = []
    for peer in peers:
        name = peer.subject.name
        if peer.subject.vocab_size != manifest.vocab_size:
            found.append(
                f"{name}: has a vocabulary of {peer.subject.vocab_size} tokens, full of {manifest.vocab_size}:"
                " another model, whose times say little"
            )
            continue
        for length, expected in full.first_tokens.items():
            if (got := peer.first_tokens[length]) != expected:
                found.append(
                    f"{name}: its first token after {length} tokens is not full's ({got} against {expected}): it has"
                    " other weights, is quantized, or prunes"
                )
                break
    return found


# --- where ------------------------------------------------------------------------------------------------------


def _versions() -> dict[str, str | None]:
    """Of what takes part; onnxruntime and onnxruntime-genai come in wheels of several names."""

    def installed(*names: str) -> str | None:
        for name in names:
            try:
                return version(name)
            except PackageNotFoundError:
                pass
        return None

    import onnxruntime

    return {
        "popcompile": installed("popcompile"),
        "onnxruntime": onnxruntime.__version__,
        "onnxruntime_genai": installed("onnxruntime-genai", "onnxruntime-genai-cuda", "onnxruntime-genai-directml"),
        "transformers": installed("transformers"),
        "torch": installed("torch"),
        "python": platform.python_version(),
    }


def _cpu() -> str:
    """The processor's model."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
