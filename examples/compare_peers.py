"""A package against other tools' models of the same checkpoint: python examples/compare_peers.py CHECKPOINT OUT

Builds CHECKPOINT (a transformers folder) with onnxruntime-genai's model builder and with mobius (PyPI: mobius-onnx),
each in a virtual environment of its own, and runs `popcompile bench OUT --against` them. The builder comes twice: as it
is, and with one row of logits (prune_lm_head), as our full prefill has. Builds and environments stay in --work and are
used again. mobius quantizes no checkpoint: with --precision int4, for a package in int4, the builder is alone.

Every model is run by ONNX Runtime; where onnxruntime-genai is installed beside popcompile, by that as well.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tabulate import tabulate

from popcompile.bench.measure import bench
from popcompile.errors import PopcompileError
from popcompile.package.manifest import read_manifest
from popcompile.progress import BENCH_STEPS, progress_bar
from popcompile.report.bench import bench_text

#: the newest that popcompile itself takes; of this machine's index, with CUDA or without
_TORCH = f"torch=={version('torch').partition('+')[0]}"
#: the builder of 0.18 cannot read Gemma-3's config as transformers 5 has it, and needs transformers 5
_BUILDER = {
    "genai": ("onnxruntime-genai>=0.14", "onnx", "onnx-ir", "transformers", _TORCH),
    "genai-0.12": ("onnxruntime-genai==0.12.*", "onnx", "onnx-ir", "transformers<5", _TORCH),
}
_MOBIUS_DTYPES = {"fp32": "f32"}


@dataclass(frozen=True)
class Peer:
    """environments: names, and what pip installs there; a later one is tried where an earlier one cannot build.
    command(checkpoint, out, precision): arguments of the environment's Python that build it, in one of precisions.
    """

    name: str
    environments: Mapping[str, tuple[str, ...]]
    precisions: tuple[str, ...]
    command: Callable[[Path, Path, str], list[str]]


def _builder(*options: str) -> Callable[[Path, Path, str], list[str]]:
    def command(checkpoint: Path, out: Path, precision: str) -> list[str]:
        arguments = ["-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(out), "-p", precision]
        return [*arguments, "-e", "cpu", "-c", str(out.with_name("cache")), *options]

    return command


def _mobius(checkpoint: Path, out: Path, precision: str) -> list[str]:
    arguments = ["-m", "mobius", "build", "--config", str(checkpoint), str(out), "--dtype", _MOBIUS_DTYPES[precision]]
    return [*arguments, "--ep", "cpu", "--runtime", "ort-genai"]


PEERS = (
    Peer("genai-builder", _BUILDER, ("fp32", "int4"), _builder()),
    Peer(
        "genai-builder-one-row",
        _BUILDER,
        ("fp32", "int4"),
        _builder("--extra_options", "prune_lm_head=true"),
    ),
    Peer("mobius", {"mobius": ("mobius-onnx", "transformers", _TORCH)}, tuple(_MOBIUS_DTYPES), _mobius),
)


def main() -> None:
    cache = Path(os.environ.get("POPCOMPILE_CACHE") or "~/.cache/popcompile").expanduser()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="transformers folder that the package was converted from")
    parser.add_argument("package", type=Path, help="the package")
    parser.add_argument("--work", type=Path, default=cache / "peers", help="folder of builds (default %(default)s)")
    parser.add_argument("--precision", choices=("fp32", "int4"), default="fp32", help="of the peers (default fp32)")
    parser.add_argument("--lengths", default="256,1024,2048", help="of the prompts, in tokens (default %(default)s)")
    parser.add_argument("--decode-tokens", type=int, default=32, help="after every prompt (default 32)")
    parser.add_argument("--repeats", type=int, default=5, help="timed turns (default 5)")
    parser.add_argument("--threads", type=int, help="of every subject (default: the machine's cores)")
    parser.add_argument("--runtime", default="popcompile", help="of the package, as `popcompile bench --runtime`")
    options = parser.parse_args()
    if not (options.checkpoint / "config.json").is_file():
        raise SystemExit(f"{options.checkpoint}: no transformers folder, it has no config.json; give the checkpoint's")
    try:
        lengths = [int(length) for length in options.lengths.split(",")]
    except ValueError:
        raise SystemExit(f"--lengths {options.lengths}: not a list of numbers, for example 256,1024") from None
    package = options.package.resolve()
    try:
        read_manifest(package)
        builds = builds_folder(options)
        peers = [peer for peer in PEERS if options.precision in peer.precisions]
        names = [name for peer in peers if (name := build(peer, options, builds))]
        if not names:
            raise SystemExit(f"{options.checkpoint}: no peer could be built; nothing to compare with")
        with progress_bar(BENCH_STEPS) as progress, contextlib.chdir(builds):  # for short names
            result = bench(
                package,
                names,
                lengths=lengths,
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
    print(f"{bench_text(result)}\n\n{ratios_text(result)}")


# --- building --------------------------------------------------------------------------------------------------


def builds_folder(options: argparse.Namespace) -> Path:
    """Where what is built of the checkpoint stays; another one after a file of the checkpoint was changed."""
    checkpoint = options.checkpoint.resolve()
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    facts = [str(checkpoint), *(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)]
    identity = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
    folder: Path = options.work.resolve() / f"{checkpoint.name}-{identity}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build(peer: Peer, options: argparse.Namespace, builds: Path) -> str | None:
    """A peer's model by its name in `builds`, built unless it is there. None, with a line on stderr, if that fails."""
    name = f"{peer.name}-{options.precision}"
    target = builds / name
    if target.is_dir():
        return name
    checkpoint = options.checkpoint.resolve()
    print(f"building {target}", file=sys.stderr)
    for environment, requirements in peer.environments.items():
        python = _environment(builds.parent / "environments" / environment, requirements)
        with tempfile.TemporaryDirectory(dir=builds, prefix=".build-") as temporary:
            out = Path(temporary) / peer.name
            command = [python, *peer.command(checkpoint, out, options.precision)]
            done = subprocess.run(
                command, cwd=temporary, env=os.environ | {"HF_HUB_OFFLINE": "1"}, capture_output=True, text=True
            )
            if not done.returncode:
                out.rename(target)
                return name
            last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            print(f"{peer.name}: {environment} cannot build {options.checkpoint}: {last}", file=sys.stderr)
    print(f"{peer.name}: left out", file=sys.stderr)
    return None


def _environment(folder: Path, requirements: tuple[str, ...]) -> str:
    """The Python of a virtual environment with the requirements, made unless it is there."""
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    installed, wanted = folder / "requirements.txt", "\n".join(requirements)
    if installed.is_file() and installed.read_text() == wanted:
        return str(python)
    print(f"installing {' '.join(requirements)} into {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *requirements]
    for command in ([sys.executable, "-m", "venv", str(folder)], pip):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
            raise SystemExit(f"{folder}: cannot be installed: {last}")
    installed.write_text(wanted)
    return str(python)


# --- the comparison --------------------------------------------------------------------------------------------


def ratios_text(result: dict[str, Any]) -> str:
    """Seconds of ours by the best peer's, medians; of each measure the best peer is the one that is fastest there."""
    pop, full, *peers = result["subjects"]
    rows = []
    for index, length in enumerate(result["settings"]["lengths"]):
        for measure, name in {"prefill": "prefill", "time_to_first_token": "first token", "decode": "decode"}.items():

            def median(subject: dict[str, Any], index: int = index, measure: str = measure) -> float:
                return subject["lengths"][index][measure]["median"]

            best = min(peers, key=median)
            ours = (f"{median(subject) / median(best):.2f}x" for subject in (full, pop))
            rows.append([f"{length:,}", name, best["name"], f"{median(best) * 1e3:.1f}", *ours])
    headers = ["tokens", "what", "best peer", "its ms", "our full / best peer", "pop / best peer"]
    return tabulate(rows, headers, disable_numparse=True, colalign=("right", "left", "left", "right", "right", "right"))


if __name__ == "__main__":
    main()
