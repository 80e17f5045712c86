"""A package on disk: its manifest, and the checks before it is used.

    prefill.onnx  decode.onnx  weights.onnx.data    or, in the unified layout, model.onnx  model.onnx_data
    popcompile.json  report.json  genai_config.json  config.json  generation_config.json  tokenizer files  passes/

popcompile.json, the manifest, names every other file with its size and SHA-256, and carries a checksum of itself.
What finds which damage:

    every use       `read_manifest`, `check_files`: the manifest, a missing file, a changed byte in any file but the
                    weights; of the weights the size and 64 samples, which tells two models apart
                    `check_external_data`: graphs that read files outside the package
    verify          also every byte of the weights: `check_files(full=True)`
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path, PureWindowsPath
from typing import Any, get_args, get_origin, get_type_hints

from popcompile.errors import PopcompileError

MANIFEST = "popcompile.json"
REPORT = "report.json"
FORMAT_VERSION = 2


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

_CHECKSUM = "manifest_sha256"


@dataclass(frozen=True)
class Manifest:
    """What a package is. Lengths are in tokens, sizes in bytes.

    pruned: layers that prefill skips for context tokens.
    dtype, block_size: precision.py; 0 where weights are not quantized.
    provider: what the graphs were lowered for; others run them too.
    prefill_threshold: prompts shorter than this take the full prefill when the runtime chooses ("auto"), and it has
        the whole model ready; 0 for none.
    layout: one of LAYOUTS. graphs: file of each stage. inputs, outputs: the I/O names of every graph, in order.
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
    prefill_threshold: int
    graphs: dict[str, str]
    weights: str
    inputs: list[str]
    outputs: list[str]
    versions: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def quantized(self) -> bool:
        """Whether weights are: kernels that pack them then round activations as well, those that do not may not."""
        return self.block_size > 0

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
        text = path.read_bytes()
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
    if version < FORMAT_VERSION:
        raise PopcompileError(
            f"{path}: was made by an older popcompile (format version {version}, this one reads {FORMAT_VERSION});"
            " convert the model again"
        )
    checksum = data.pop(_CHECKSUM, None)
    if problem := _wrong_fields(data):
        raise PopcompileError(f"{path}: {problem}; convert the model again")
    if checksum != _checksum(data):
        raise PopcompileError(f"{path}: was changed after the package was made; convert the model again")
    manifest = Manifest(**data)
    used = (*manifest.graphs.values(), manifest.weights)
    for name in (*manifest.files, *used):
        _require_inside(folder, name)
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


def check_files(folder: Path, manifest: Manifest, *, full: bool = False) -> None:
    """Check that every file of the package is there and is the one that the manifest means.

    All are hashed, but of the weights only samples are; `full` hashes the weights too.
    Raises PopcompileError naming the first file that differs.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        sampled = not full and name == manifest.weights and "sample_sha256" in expected
        try:
            same = path.stat().st_size == expected.get("size") and (
                sample_sha256(path) == expected["sample_sha256"]
                if sampled
                else file_sha256(path) == expected.get("sha256")
            )
        except (FileNotFoundError, NotADirectoryError):
            raise PopcompileError(f"{folder}: {name} is missing; convert the model again") from None
        except OSError as error:
            raise PopcompileError(
                f"{folder}: {name} cannot be read ({error.strerror}); make it readable for this user"
            ) from error
        if not same:
            raise PopcompileError(
                f"{folder}: {name} is not the file that this package was made with (changed, damaged, or of another"
                " package); convert the model again"
            )


def check_external_data(folder: Path, manifest: Manifest) -> None:
    """Check that the graphs read external data from the package's own weights file only. Raises PopcompileError."""
    import onnx

    for name in manifest.graphs.values():
        try:
            model = onnx.load(folder / name, load_external_data=False)
        except Exception as error:
            raise PopcompileError(f"{folder}: {name} is not a readable ONNX file; convert the model again") from error
        for tensor in _tensors(model):
            if tensor.data_location != onnx.TensorProto.EXTERNAL and not tensor.external_data:
                continue
            locations = [entry.value for entry in tensor.external_data if entry.key == "location"]
            if locations != [manifest.weights]:
                raise PopcompileError(
                    f"{folder}: {name} reads {tensor.name} from {', '.join(locations) or 'nowhere'} and not from the"
                    f" package's {manifest.weights}; do not use it, convert the model again"
                )


def _tensors(message: Any) -> Iterator[Any]:
    """Every TensorProto in an ONNX model, wherever it is: initializers, attributes, subgraphs, functions."""
    for descriptor, value in message.ListFields():
        if descriptor.message_type is None:
            continue
        for item in value if isinstance(value, Sequence) else [value]:
            if descriptor.message_type.name == "TensorProto":
                yield item
            else:
                yield from _tensors(item)


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sample_sha256(path: Path, samples: int = 64, length: int = 65536) -> str:
    """SHA-256 over evenly spaced pieces of a file: tells two models' weights apart without reading gigabytes."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for i in range(samples):
            file.seek(max(size - length, 0) * i // max(samples - 1, 1))
            digest.update(file.read(length))
    return digest.hexdigest()


def describe_files(folder: Path, weights: str, known: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """{name: {"size", "sha256"}} of the files in `folder`; `known` has hashes that are computed already.

    weights: the data file, of which samples are hashed as well.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": (known or {}).get(name) or file_sha256(path)}
        if name == weights:
            files[name]["sample_sha256"] = sample_sha256(path)
    return files
