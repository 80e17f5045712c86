"""What other tools make of a checkpoint, and what runs it: one entry of PEERS each."""

from __future__ import annotations

import hashlib
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from peer_models.environments import Environment, Installed, PeerError, install, run

#: classes of weights, as peers' models and packages are compared in
CLASSES = ("fp32", "int8", "int4")
_HERE = Path(__file__).parent
#: the newest that popcompile itself takes; of this machine's index, with CUDA or without
_TORCH = f"torch=={version('torch').partition('+')[0]}"
#: the builder of 0.18 cannot read Gemma-3's config as transformers 5 has it, and needs transformers 5
_BUILDER = {
    "genai": Environment(("onnxruntime-genai>=0.14", "onnx", "onnx-ir", "transformers", _TORCH)),
    "genai-0.12": Environment(("onnxruntime-genai==0.12.*", "onnx", "onnx-ir", "transformers<5", _TORCH)),
}
_MOBIUS = {"mobius": Environment(("mobius-onnx", "transformers", _TORCH))}
#: torchvision of PyPI does not load beside a torch without CUDA, and models of text need none
_OPENVINO = {"openvino": Environment(("openvino-genai", "optimum-intel[openvino]", _TORCH), without=("torchvision",))}
#: llama.cpp's converter is in no registry but as part of llama-cpp-python's source
_LLAMA = {
    "llama.cpp": Environment(
        ("gguf", "sentencepiece", "transformers", _TORCH),
        npm=("node-llama-cpp@3.22.1", "@node-llama-cpp/{platform}@3.22.1"),
        source="llama-cpp-python==0.3.36",
    )
}


@dataclass(frozen=True)
class Peer:
    """environments: by name; a later one is tried where an earlier one cannot build. words: what the tool calls those
    of CLASSES that it has. commands(installed, checkpoint, out, word): build a model in the folder `out`.
    model: what is run of `out`, where it is not the folder. program(installed, context): runs it, where ONNX Runtime
    does not; context: tokens that a prompt and what follows it have at most. build: the peer whose build it shares.
    """

    name: str
    environments: Mapping[str, Environment]
    words: Mapping[str, str]
    commands: Callable[[Installed, Path, Path, str], list[list[str]]]
    model: str = ""
    program: Callable[[Installed, int], list[str]] | None = None
    build: str = ""


@dataclass(frozen=True)
class Built:
    """A peer's model. name: its folder's in that of all builds, or the peer's, where peers share a folder."""

    peer: Peer
    weights: str
    name: str
    path: Path
    installed: Installed


def _builder(*options: str) -> Callable[[Installed, Path, Path, str], list[list[str]]]:
    def commands(installed: Installed, checkpoint: Path, out: Path, word: str) -> list[list[str]]:
        arguments = ["-m", "onnxruntime_genai.models.builder", "-i", str(checkpoint), "-o", str(out), "-p", word]
        return [[installed.python, *arguments, "-e", "cpu", "-c", str(out.with_name("cache")), *options]]

    return commands


def _mobius(installed: Installed, checkpoint: Path, out: Path, word: str) -> list[list[str]]:
    arguments = ["-m", "mobius", "build", "--config", str(checkpoint), str(out), "--dtype", word]
    return [[installed.python, *arguments, "--ep", "cpu", "--runtime", "ort-genai"]]


def _openvino(installed: Installed, checkpoint: Path, out: Path, word: str) -> list[list[str]]:
    export = [str(Path(installed.python).with_name("optimum-cli")), "export", "openvino", "--model", str(checkpoint)]
    weights = ["--weight-format", word]
    if word == "int4":  # in blocks of 128, or of as many as the model's widths allow
        weights += ["--group-size-fallback", "adjust"]
    return [[*export, "--task", "text-generation-with-past", *weights, str(out)]]


def _openvino_program(*properties: str) -> Callable[[Installed, int], list[str]]:
    return lambda installed, context: [installed.python, str(_HERE / "openvino_worker.py"), *properties]


def _llama(installed: Installed, checkpoint: Path, out: Path, word: str) -> list[list[str]]:
    out.mkdir()
    model, half = out / "model.gguf", out.with_name("f16.gguf")
    converter = str(installed.source / "vendor" / "llama.cpp" / "convert_hf_to_gguf.py")
    libraries = next((installed.node_modules / "@node-llama-cpp").glob("*/bins/*"))
    convert = [installed.python, converter, str(checkpoint), "--outtype", "f16", "--outfile"]
    if word == "f16":
        return [[*convert, str(model)]]
    quantize = [installed.python, str(_HERE / "quantize_gguf.py"), str(libraries), str(half), str(model), word]
    return [[*convert, str(half)], quantize]


def _llama_program(installed: Installed, context: int) -> list[str]:
    return ["node", str(_HERE / "llama_worker.mjs"), str(installed.node_modules), str(context)]


_BUILDER_WORDS = {"fp32": "fp32", "int4": "int4"}
_ACCURATE = ("INFERENCE_PRECISION_HINT=f32", "KV_CACHE_PRECISION=f32")
PEERS = (
    Peer("genai-builder", _BUILDER, _BUILDER_WORDS, _builder()),
    Peer("genai-builder-one-row", _BUILDER, _BUILDER_WORDS, _builder("--extra_options", "prune_lm_head=true")),
    Peer("mobius", _MOBIUS, {"fp32": "f32"}, _mobius),
    Peer("openvino", _OPENVINO, dict(zip(CLASSES, CLASSES, strict=True)), _openvino, program=_openvino_program()),
    Peer(
        "openvino-all-f32",
        _OPENVINO,
        {"fp32": "fp32"},
        _openvino,
        program=_openvino_program(*_ACCURATE),
        build="openvino",
    ),
    Peer(
        "llama.cpp",
        _LLAMA,
        {"fp32": "f16", "int8": "q8_0", "int4": "q4_0"},
        _llama,
        model="model.gguf",
        program=_llama_program,
    ),
)


def builds_folder(work: Path, checkpoint: Path) -> Path:
    """Where what is built of the checkpoint stays; another one after a file of the checkpoint was changed."""
    files = sorted(path for path in checkpoint.iterdir() if path.is_file())
    facts = [str(checkpoint), *(f"{path.name} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files)]
    identity = hashlib.sha256("\n".join(facts).encode()).hexdigest()[:12]
    folder = work / f"{checkpoint.name}-{identity}"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def build(peer: Peer, weights: str, checkpoint: Path, builds: Path) -> Built | None:
    """A peer's model in `builds`, built unless it is there. None, with a line on stderr, if that fails."""
    word = peer.words[weights]
    target = builds / f"{peer.build or peer.name}-{word}"
    for name, environment in peer.environments.items():
        try:
            installed = install(builds.parent / "environments" / name, environment)
            if not target.is_dir():
                print(f"building {target}", file=sys.stderr)
                _build(peer, installed, checkpoint, target, word)
        except PeerError as error:
            print(f"{peer.name}: {name} cannot build {checkpoint}: {error}", file=sys.stderr)
        else:
            return Built(peer, weights, peer.name if peer.build else target.name, target / peer.model, installed)
    print(f"{peer.name}: left out", file=sys.stderr)
    return None


def _build(peer: Peer, installed: Installed, checkpoint: Path, target: Path, word: str) -> None:
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".build-") as temporary:
        out = Path(temporary) / peer.name
        for command in peer.commands(installed, checkpoint, out, word):
            run(command, Path(temporary))
        out.rename(target)
