"""A package against other tools' models of the same checkpoint: python examples/compare_peers.py CHECKPOINT OUT ...

Builds CHECKPOINT (a transformers folder) with other tools, each in an environment of its own, and measures them beside
the package as `popcompile bench` does, alternating:

    genai-builder            onnxruntime-genai's model builder as it is, fp32 and int4
    genai-builder-one-row    the same with one row of logits (prune_lm_head), as our full prefill has
    mobius                   PyPI: mobius-onnx, fp32
    openvino                 OpenVINO GenAI of what optimum-intel exports, fp32, int8 and int4, else as it is by default
    openvino-all-f32         its fp32 export, computed in f32 and with a cache in f32
    llama.cpp                by node-llama-cpp (needs Node.js), GGUF in F16, Q8_0 and Q4_0

The first two and mobius are run by ONNX Runtime, and, where onnxruntime-genai is installed beside popcompile, by that
as well. Several packages of CHECKPOINT may be given, say in fp32, w8a8 and int4: each is compared with the peers whose
weights have as many bits. Builds and environments stay in --work and are used again.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from peer_models.builds import CLASSES, PEERS, Built, build, builds_folder
from tabulate import tabulate

from popcompile.bench.measure import bench
from popcompile.bench.subjects import Subject
from popcompile.errors import PopcompileError
from popcompile.package.benchmark import Benchmark, Measure, SubjectResult
from popcompile.package.manifest import read_manifest
from popcompile.progress import BENCH_STEPS, progress_bar
from popcompile.report.bench import bench_text

#: of CLASSES, where it is not a precision's own name
_CLASS_OF = {"w8a8": "int8", "fp16": "fp32", "bf16": "fp32"}


def main() -> None:
    options = _options()
    packages = [package.resolve() for package in options.packages]
    try:
        weights = {str(package): weights_class(read_manifest(package).dtype) for package in packages}
        wanted = [name for name in CLASSES if name in weights.values()]
        checkpoint = options.checkpoint.resolve()
        builds = builds_folder(options.work.resolve(), checkpoint)
        chosen = [(peer, name) for peer in PEERS if peer.name in options.peers for name in wanted if name in peer.words]
        built = [model for peer, name in chosen if (model := build(peer, name, checkpoint, builds))]
        if not built:
            raise SystemExit(f"{options.checkpoint}: no peer could be built; nothing to compare with")
        context = max(options.lengths) + options.decode_tokens + 1
        vocabulary = read_manifest(packages[0]).vocab_size
        with progress_bar(BENCH_STEPS) as progress, contextlib.chdir(builds):  # for short names
            result = bench(
                packages[0],
                [*packages[1:], *(subject(model, vocabulary, context) for model in built)],
                lengths=options.lengths,
                decode_tokens=options.decode_tokens,
                repeats=options.repeats,
                threads=options.threads,
                runtime=options.runtime,
                progress=progress,
            )
    except PopcompileError as error:
        raise SystemExit(str(error)) from error
    for warning in result["warnings"]:
        print(warning, file=sys.stderr)
    weights["pop"] = weights["full"] = weights[str(packages[0])]
    peers = {model.name: model.weights for model in built}
    print(f"{bench_text(result)}\n\n{classes_text(result, weights, peers)}")


def _options() -> argparse.Namespace:
    cache = Path(os.environ.get("POPCOMPILE_CACHE") or "~/.cache/popcompile").expanduser()
    names = [peer.name for peer in PEERS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="transformers folder that the packages were converted from")
    parser.add_argument("packages", metavar="OUT", type=Path, nargs="+", help="a package")
    parser.add_argument("--work", type=Path, default=cache / "peers", help="folder of builds (default %(default)s)")
    parser.add_argument("--peers", default=",".join(names), help="which of them (default %(default)s)")
    parser.add_argument("--lengths", default="256,1024,2048", help="of the prompts, in tokens (default %(default)s)")
    parser.add_argument("--decode-tokens", type=int, default=32, help="after every prompt (default 32)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns (default 5)")
    parser.add_argument("--threads", type=int, help="of every subject (default: the machine's cores)")
    parser.add_argument("--runtime", default="popcompile", help="of the package, as `popcompile bench --runtime`")
    options = parser.parse_args()
    if not (options.checkpoint / "config.json").is_file():
        raise SystemExit(f"{options.checkpoint}: no transformers folder, it has no config.json; give the checkpoint's")
    try:
        options.lengths = [int(length) for length in options.lengths.split(",")]
    except ValueError:
        raise SystemExit(f"--lengths {options.lengths}: not a list of numbers, for example 256,1024") from None
    options.peers = options.peers.split(",")
    if unknown := [name for name in options.peers if name not in names]:
        raise SystemExit(f"--peers {unknown[0]}: there is no such peer; choose of {', '.join(names)}")
    return options


def weights_class(dtype: str) -> str:
    """That of CLASSES which a package of this precision is compared in."""
    return _CLASS_OF.get(dtype, dtype)


def subject(model: Built, vocabulary: int, context: int) -> Path | Subject:
    """What bench takes for a peer's model. context: tokens that a prompt and what follows it have at most."""
    if model.peer.program is None:
        return Path(model.name)
    command = tuple(model.peer.program(model.installed, context))
    return Subject(model.name, "program", model.path, vocabulary, None, required=False, command=command)


# --- the comparison --------------------------------------------------------------------------------------------


def classes_text(result: Benchmark, packages: Mapping[str, str], peers: Mapping[str, str]) -> str:
    """A row for each subject, those of one class together; packages, peers: the class of each, by name.

    Times to the first token stand beside how many times that of the class's package they are. `*` marks the peer that
    is the fastest of its class, in time and in tokens/s. At the end, how many tokens after each prompt are full's.
    """
    weights = {**packages, **peers}
    lengths = result["settings"]["lengths"]
    full = result["subjects"][1]
    rows = []
    for name in CLASSES:
        subjects = [subject for subject in result["subjects"] if weights[_model(subject)] == name]
        theirs = [subject for subject in subjects if _model(subject) in peers]
        for each in subjects:
            ours = next(subject for subject in subjects if subject is not full and subject not in theirs)
            cells = [cell for index in range(len(lengths)) for cell in _cells(each, ours, theirs, index)]
            rows.append([name, each["name"], *cells, "" if each is full else agreement_words(full, each)])
    headers = ["weights", "subject"]
    for length in lengths:
        headers += [f"{length:,}: first token, ms", "/ package", "tokens/s"]
    align = ("left", "left", *["right"] * (3 * len(lengths)), "left")
    return tabulate(rows, [*headers, "tokens as full's"], disable_numparse=True, colalign=align)


def _model(subject: SubjectResult) -> str:
    """Its name, without the runtime where bench adds one."""
    return subject["name"].removesuffix(" (genai)")


def _cells(each: SubjectResult, ours: SubjectResult, peers: Sequence[SubjectResult], index: int) -> list[str]:
    """Of one length: milliseconds, the ratio and tokens/s."""

    def median(one: SubjectResult, measure: Measure) -> float:
        return one["lengths"][index][measure]["median"]

    def mark(measure: Measure) -> str:
        return "*" if each in peers and each is min(peers, key=lambda peer: median(peer, measure)) else ""

    first = median(each, "time_to_first_token")
    return [
        f"{first * 1e3:.0f}{mark('time_to_first_token')}",
        f"{first / median(ours, 'time_to_first_token'):.2f}x",
        f"{each['lengths'][index]['decode']['tokens_per_second']:.1f}{mark('decode')}",
    ]


def agreement_words(full: SubjectResult, other: SubjectResult) -> str:
    """Of the tokens after each prompt how many, from the first on, are the full model's: "33 33 4 of 33"."""
    same = []
    for theirs, expected in zip(other["lengths"], full["lengths"], strict=True):
        (found,), (wanted,) = theirs["continuation"], expected["continuation"]
        pairs = zip(found, wanted, strict=True)
        same.append(next((index for index, (a, b) in enumerate(pairs) if a != b), len(wanted)))
    return f"{' '.join(map(str, same))} of {len(wanted)}"


if __name__ == "__main__":
    main()
