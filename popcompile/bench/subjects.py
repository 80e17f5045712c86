"""What `bench` compares a package with: other packages, decoders that other tools made, and checkpoints."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from popcompile.bench.onnx_decoder import GENAI_CONFIG, LOOKED_FOR, OnnxDecoder, read_decoder
from popcompile.errors import PopcompileError
from popcompile.export.providers import activations
from popcompile.files import require_utf8
from popcompile.loading import quiet, read_json, reading
from popcompile.package.image_inputs import ImageInputs
from popcompile.package.manifest import MANIFEST, read_manifest

#: what a package runs in, and its subject's kind
RUNTIMES = {"popcompile": "package", "onnxruntime-genai": "genai"}
#: sections of genai_config.json's model that a text decoder of one graph does not have
_OTHER_PARTS = ("encoder", "vision", "speech", "embedding")


@dataclass(frozen=True)
class Subject:
    """One thing that is measured, in a process of its own.

    kind: "package" (through popcompile's runtime), "onnx" (its graph, `decoder`, through ONNX Runtime), "genai" (the
    folder through onnxruntime-genai), "transformers" (a checkpoint), or "program" (what `command` starts, which answers
    as worker.py does). required: without it there is no benchmark. images: what it takes of them. dtype: of
    activations, where it is known; a checkpoint's of weights too.
    """

    name: str
    kind: str
    path: Path
    vocab_size: int
    context_length: int | None
    decoder: OnnxDecoder | None = None
    required: bool = True
    images: ImageInputs | None = None
    model_type: str = ""
    dtype: str = ""
    command: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the worker."""
        return {
            "kind": self.kind,
            "path": str(self.path.absolute()),
            "decoder": asdict(self.decoder) if self.decoder else None,
            "images": asdict(self.images) if self.images else None,
            "dtype": self.dtype,
        }


def require_runtime(runtime: str) -> None:
    """Raises PopcompileError where a package cannot run in `runtime` here."""
    if runtime not in RUNTIMES:
        raise PopcompileError(f"--runtime {runtime}: unknown; choose one of {', '.join(RUNTIMES)}")
    if RUNTIMES[runtime] == "genai" and not has_genai():
        raise PopcompileError(f"--runtime {runtime}: it is not installed; pip install onnxruntime-genai-cuda")


def package_subject(name: str, folder: Path, runtime: str) -> Subject:
    """runtime: one of RUNTIMES. Raises PopcompileError where `folder` is no package."""
    require_utf8(folder)
    manifest = read_manifest(folder)
    return Subject(
        name, RUNTIMES[runtime], folder, manifest.vocab_size, manifest.context_length, images=manifest.images,
        model_type=manifest.model_type, dtype=activations(manifest.dtype, manifest.provider),
    )  # fmt: skip


def find_peers(package: Subject, against: Iterable[Path | Subject], runtime: str) -> list[Subject]:
    """The subjects that the folders and files of `against` are; one that onnxruntime-genai can run, if it is installed,
    is two. runtime: of packages. Raises PopcompileError for one that is none, or that is there already.
    """
    places = {package.path.resolve()}
    subjects: list[Subject] = []
    for path in against:
        if isinstance(path, Subject):
            subjects.append(path)
            continue
        found = _find(path, runtime, package)
        place = Path(found.decoder.graph if found.decoder else path).resolve()
        if place in places:
            raise PopcompileError(f"--against {path}: is given twice, or is OUT itself; leave it out")
        places.add(place)
        subjects.append(found)
        if found.decoder and path.is_dir() and (path / GENAI_CONFIG).is_file() and has_genai():
            subjects.append(replace(found, name=f"{path} (genai)", kind="genai", decoder=None, required=False))
    return subjects


def has_genai() -> bool:
    """Whether onnxruntime-genai is installed; to import it would load a second copy of ONNX Runtime."""
    return importlib.util.find_spec("onnxruntime_genai") is not None


def _find(path: Path, runtime: str, package: Subject) -> Subject:
    try:
        is_package, is_there = (path / MANIFEST).is_file(), path.exists()
    except OSError as error:
        raise PopcompileError(f"--against {path}: cannot be read ({error.strerror}); give another") from error
    if not is_there:
        raise PopcompileError(f"--against {path}: there is no such folder or file; give one that is there")
    if is_package:
        return package_subject(str(path), path, runtime)
    require_utf8(path)
    if _is_checkpoint(path):
        return _checkpoint(path, package)
    decoder = read_decoder(_graph(path))
    return Subject(str(path), "onnx", path, decoder.vocab_size, decoder.context_length, decoder)


def _is_checkpoint(path: Path) -> bool:
    """Whether it has weights as transformers keeps them, and no graph."""
    return path.is_dir() and any(path.glob("*.safetensors")) and not any(path.glob("**/*.onnx"))


def _checkpoint(path: Path, package: Subject) -> Subject:
    """A checkpoint, in the package's precision; it takes the package's images where it is a model of the same type."""
    from transformers import AutoConfig

    with quiet(), reading(str(path), "transformers does not load its config; leave it out of --against"):
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        text = config.get_text_config(decoder=True)
        vocabulary, context = int(text.vocab_size), getattr(text, "max_position_embeddings", None)
    images = package.images if config.model_type == package.model_type else None
    return Subject(
        str(path), "transformers", path, vocabulary, context, images=images, model_type=config.model_type,
        dtype=package.dtype,
    )  # fmt: skip


def _graph(path: Path) -> Path:
    """The file of the one graph of a decoder."""
    if not path.is_dir():
        if path.suffix.lower() != ".onnx":
            raise _nothing_known(path, "it is no .onnx file")
        return path
    if (path / GENAI_CONFIG).is_file():
        return _genai_graph(path)
    graphs = sorted(path.glob("*.onnx")) or sorted(path.glob("onnx/*.onnx"))
    if (path / "model.onnx") in graphs:
        return path / "model.onnx"
    if not graphs:
        raise _nothing_known(path, "it has none of them")
    if len(graphs) > 1:
        names = ", ".join(graph.name for graph in graphs[:4])
        raise PopcompileError(f"--against {path}: has {len(graphs)} graphs ({names}); give the file of a whole decoder")
    return graphs[0]


def _genai_graph(folder: Path) -> Path:
    """The graph that genai_config.json names."""
    model = read_json(str(folder), folder / GENAI_CONFIG).get("model")
    decoder = model.get("decoder") if isinstance(model, dict) else None
    if not isinstance(model, dict) or not isinstance(decoder, dict):
        raise _nothing_known(folder, f"its {GENAI_CONFIG} describes no decoder")
    if "pipeline" in decoder or any(part in model for part in _OTHER_PARTS):
        raise _nothing_known(folder, f"its {GENAI_CONFIG} describes several graphs")
    name = decoder.get("filename", "model.onnx")
    if not isinstance(name, str) or not (folder / name).is_file():
        raise _nothing_known(folder, f"its {GENAI_CONFIG} names the graph {name}, which is not there")
    return folder / name


def _nothing_known(path: Path, reason: str) -> PopcompileError:
    return PopcompileError(
        f"--against {path}: nothing that bench can run, {reason}; looked for a popcompile package ({MANIFEST}), an"
        f" onnxruntime-genai model ({GENAI_CONFIG} with one decoder), a checkpoint (*.safetensors) and a graph"
        f" (model.onnx, or one .onnx file); of a graph, {LOOKED_FOR.removeprefix('looked for ')}"
    )
