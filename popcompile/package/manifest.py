"""A package on disk: its manifest, and the checks before it is used.

    prefill.onnx  decode.onnx  weights.onnx.data    or, in the unified layout, model.onnx  model.onnx_data
    vision.onnx  embedding.onnx                     of a vision-language model, over the same weights; IMAGE_LAYOUTS has
                                                    the names in the unified layout
    popcompile.json  report.json  genai_config.json  config.json  generation_config.json  tokenizer files  passes/

popcompile.json, the manifest, names every other file with its size and SHA-256, and carries a checksum of itself.
Hashes are no seal: who changes a file can write a manifest that fits. So what is read is checked in what it says, too:

    read_manifest   the manifest: types and values of its fields
    check_files     the files are those of the manifest, all of them and no others (integrity.py)
    check_graphs    what the graphs compute and where they read (graph_check.py)
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, get_args, get_origin, get_type_hints

from popcompile.errors import PopcompileError
from popcompile.export.io_names import IMAGE_OUTPUTS
from popcompile.files import read_regular
from popcompile.package.image_inputs import ImageInputs
from popcompile.package.integrity import MANIFEST, check_files, describe_files, file_sha256
from popcompile.package.manifest_values import wrong_value

__all__ = ["FORMAT_VERSION", "IMAGE_LAYOUTS", "LAYOUTS", "MANIFEST", "PASSES", "REPORT", "Layout", "Manifest"]
__all__ += ["check_files", "describe_files", "file_sha256", "read_manifest"]

REPORT = "report.json"
#: folder of the graph after every pass, as text
PASSES = "passes"
FORMAT_VERSION = 4
#: the oldest that is read
_OLDEST_VERSION = 2


@dataclass(frozen=True)
class Layout:
    """The names of a package's files. graphs: of each stage."""

    graphs: dict[str, str]
    weights: str


#: unified has the prefill graph alone, which is a decoder as well, under the names that optimum and transformers.js
#: look for
LAYOUTS = {
    "split": Layout({"prefill": "prefill.onnx", "decode": "decode.onnx"}, "weights.onnx.data"),
    "unified": Layout({"prefill": "model.onnx"}, "model.onnx_data"),
}

#: of a vision-language model, with the graphs that make the decoder's inputs; transformers.js looks for other names
#: then, and has text embedded apart
IMAGE_LAYOUTS = {
    "split": Layout(
        LAYOUTS["split"].graphs | {"vision": "vision.onnx", "embedding": "embedding.onnx"}, LAYOUTS["split"].weights
    ),
    "unified": Layout(
        {
            "prefill": "decoder_model_merged.onnx",
            "vision": "vision_encoder.onnx",
            "embedding": "embedding.onnx",
            "text_embedding": "embed_tokens.onnx",
        },
        "decoder_model_merged.onnx_data",
    ),
}

_CHECKSUM = "manifest_sha256"
#: bytes; one of a thousand layers and as many files has a tenth of it
_MANIFEST_LIMIT = 4 << 20
_NAME_LIMIT = 200  # characters of a file's name


@dataclass(frozen=True)
class Manifest:
    """What a package is. Lengths are in tokens, sizes in bytes.

    pruned: layers that prefill skips for context tokens.
    dtype: a name in export/precisions.py. block_size: target.py; 0 where weights are not quantized.
    provider: what the graphs were lowered for; others run them too.
    window: how many tokens at a prompt's end take the whole model; a prompt that has no more is encoded in full.
    layout: a name in LAYOUTS. graphs: file of each stage. inputs, outputs: the I/O names of the decoder's, in order.
    vision: the fields of ImageInputs, of a vision-language model; else empty.
    files: {name: {"size", "sha256"}} of every other file in the package.
    """

    format_version: int
    popcompile: str
    source: dict[str, Any]
    model_type: str
    num_layers: int
    num_kv_heads: int
    head_size: int
    vocab_size: int
    context_length: int
    pruned: list[int]
    kv_projection: str
    dtype: str
    block_size: int
    provider: str
    layout: str
    window: int
    graphs: dict[str, str]
    weights: str
    inputs: list[str]
    outputs: list[str]
    versions: dict[str, str]
    vision: dict[str, Any] = field(default_factory=dict)
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        """Whether weights are: kernels that pack them then round activations as well, those that do not may not."""
        return self.block_size > 0

    @property
    def images(self) -> ImageInputs | None:
        """What the graphs take of images; None for a model of text alone."""
        return ImageInputs(**self.vision) if self.vision else None

    @property
    def stages(self) -> list[str]:
        """Those with a graph of the decoder."""
        return [stage for stage in self.graphs if stage not in IMAGE_OUTPUTS]

    def to_json(self) -> str:
        content = asdict(self)
        return json.dumps(content | {_CHECKSUM: _checksum(content)}, indent=2) + "\n"


def _checksum(content: dict[str, Any]) -> str:
    """SHA-256 of a manifest without its checksum."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the package in `folder`.

    Raises PopcompileError where there is none, one that was changed, or one that this version cannot read.
    """
    path = folder / MANIFEST
    try:
        text = read_regular(path, _MANIFEST_LIMIT)
    except (FileNotFoundError, NotADirectoryError):
        if folder.is_dir():
            raise PopcompileError(
                f"{folder}: not a popcompile package, it has no {MANIFEST}; give the folder that"
                " `popcompile convert` made"
            ) from None
        raise PopcompileError(
            f"{folder}: no such package folder; make one with `popcompile convert MODEL {folder}`"
        ) from None
    except OSError as error:
        raise PopcompileError(f"{path}: cannot be read ({error.strerror}); make it readable for this user") from error
    except ValueError as error:  # NUL or a lone surrogate in the path
        raise PopcompileError(f"{str(folder)!r}: no such package folder; no path is called so") from error
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder)):
        raise PopcompileError(f"{path}: is a link that leads out of the package; put the file itself there")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise PopcompileError(f"{path}: is not JSON ({error}); convert the model again") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if type(version) is not int or version < 1:
        raise PopcompileError(f"{path}: not a popcompile manifest, it has no format_version; convert the model again")
    if version > FORMAT_VERSION:
        raise PopcompileError(
            f"{path}: format version {version} is newer than this popcompile reads ({FORMAT_VERSION});"
            " upgrade popcompile"
        )
    if version < _OLDEST_VERSION:
        raise PopcompileError(
            f"{path}: was made by an older popcompile (format version {version}, this one reads {_OLDEST_VERSION} to"
            f" {FORMAT_VERSION}); convert the model again"
        )
    checksum, made = data.pop(_CHECKSUM, None), dict(data)
    if version == 2:  # before windows
        data.pop("prefill_threshold", None)
        data.setdefault("window", 1)
    if version < 4:  # before images
        data.setdefault("vision", {})
    if problem := _wrong_fields(data):
        raise PopcompileError(f"{path}: {problem}; convert the model again")
    if checksum != _checksum(made):
        raise PopcompileError(f"{path}: was changed after the package was made; convert the model again")
    manifest = Manifest(**data)
    used = (*manifest.graphs.values(), manifest.weights, REPORT, "config.json")
    for name in (*manifest.files, *used):
        _require_inside(folder, name)
    if problem := wrong_value(manifest):
        raise PopcompileError(f"{path}: {problem}; convert the model again")
    if unlisted := sorted(set(used) - set(manifest.files)):
        raise PopcompileError(f"{path}: does not list {unlisted[0]} among its files; convert the model again")
    return manifest


def _wrong_fields(data: dict[str, Any]) -> str:
    """What is wrong with a manifest's fields, or ""."""
    kinds = _field_types()
    if missing := sorted(set(kinds) - set(data)):
        return f"has no field {missing[0]}"
    if unknown := sorted(set(data) - set(kinds)):
        return f"has an unknown field {unknown[0]}"
    return next((f"field {name} has a wrong value" for name, kind in kinds.items() if not _fits(data[name], kind)), "")


@functools.cache
def _field_types() -> dict[str, Any]:
    return get_type_hints(Manifest)


def _fits(value: Any, kind: Any) -> bool:
    """Whether a JSON value has the type of a manifest field, its items included."""
    if kind is Any:
        return True
    if type(value) is not (get_origin(kind) or kind):
        return False
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return all(_fits(item, get_args(kind)[-1]) for item in items)


def _require_inside(folder: Path, name: str) -> None:
    path = PureWindowsPath(name)  # takes both kinds of slashes
    if path.anchor or ".." in path.parts or not path.parts:
        raise PopcompileError(f"{folder}: the manifest names {name!r}, which is outside the package; do not use it")
    if not name.isprintable() or len(name) > _NAME_LIMIT or str(PurePosixPath(name)) != name or name == MANIFEST:
        raise PopcompileError(f"{folder}: the manifest names {name[:80]!r}, which no package has; do not use it")
