"""A package on disk: its manifest, how it appears whole or not at all, and the checks before it is used.

    prefill.onnx  decode.onnx  weights.onnx.data  popcompile.json  report.json  genai_config.json
    config.json  generation_config.json  tokenizer files  passes/

popcompile.json, the manifest, names every other file with its size and SHA-256.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from popcompile.errors import PopcompileError

MANIFEST = "popcompile.json"
REPORT = "report.json"
WEIGHTS = "weights.onnx.data"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class Manifest:
    """What a package is. Lengths are in tokens, sizes in bytes.

    pruned: layers that prefill skips for context tokens.
    prefill_threshold: prompts shorter than this take the full prefill when the runtime chooses ("auto").
    graphs: file of each stage. inputs, outputs: the I/O names of every graph, in order.
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
    layout: str
    prefill_threshold: int
    graphs: dict[str, str]
    weights: str
    inputs: list[str]
    outputs: list[str]
    versions: dict[str, str]
    files: dict[str, dict[str, Any]] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def read_manifest(folder: Path) -> Manifest:
    """The manifest of the package in `folder`.

    Raises PopcompileError where there is none, or one that this version cannot read.
    """
    path = folder / MANIFEST
    if not folder.is_dir():
        raise PopcompileError(f"{folder}: no such package folder; make one with `popcompile convert MODEL {folder}`")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PopcompileError(f"{folder}: not a popcompile package, it has no {MANIFEST}") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise PopcompileError(f"{path}: cannot be read ({error}); convert the model again") from error
    version = data.get("format_version") if isinstance(data, dict) else None
    if not isinstance(version, int):
        raise PopcompileError(f"{path}: not a popcompile manifest, it has no format_version; convert the model again")
    if version > FORMAT_VERSION:
        raise PopcompileError(
            f"{path}: format version {version} is newer than this popcompile reads ({FORMAT_VERSION});"
            " upgrade popcompile"
        )
    try:
        manifest = Manifest(**data)
    except TypeError as error:
        raise PopcompileError(f"{path}: fields are missing or unknown ({error}); convert the model again") from error
    for name in (*manifest.files, *manifest.graphs.values(), manifest.weights):
        _require_inside(folder, name)
    return manifest


def _require_inside(folder: Path, name: str) -> None:
    path = Path(name)
    if path.is_absolute() or ".." in path.parts:
        raise PopcompileError(f"{folder}: the manifest names {name}, which is outside the package; do not use it")


def check_files(folder: Path, manifest: Manifest, *, full: bool = False) -> None:
    """Check that every file of the package is there and is the one that the manifest means.

    Graphs are hashed and the others compared by size; `full` hashes them all, weights included.
    Raises PopcompileError naming the first file that differs.
    """
    for name, expected in manifest.files.items():
        path = folder / name
        try:
            size = path.stat().st_size
        except OSError:
            raise PopcompileError(f"{folder}: {name} is missing; convert the model again") from None
        same = size == expected["size"]
        if same and (full or name in manifest.graphs.values()):
            same = file_sha256(path) == expected["sha256"]
        elif same and name == manifest.weights and "sample_sha256" in expected:
            same = sample_sha256(path) == expected["sample_sha256"]
        if not same:
            raise PopcompileError(
                f"{folder}: {name} is not the file that this package was made with (changed, damaged, or of another"
                " package); convert the model again"
            )


def check_external_data(folder: Path, manifest: Manifest) -> None:
    """Check that the graphs read external data from the package's own weights file only. Raises PopcompileError."""
    import onnx
    from onnx.external_data_helper import uses_external_data

    for name in manifest.graphs.values():
        try:
            model = onnx.load(folder / name, load_external_data=False)
        except Exception as error:
            raise PopcompileError(f"{folder}: {name} is not a readable ONNX file; convert the model again") from error
        for tensor in model.graph.initializer:
            if uses_external_data(tensor):
                entries = {e.key: e.value for e in tensor.external_data}
                if entries.get("location") != manifest.weights:
                    raise PopcompileError(
                        f"{folder}: {name} reads {tensor.name} from {entries.get('location')}, outside the package's"
                        f" {manifest.weights}; do not use it"
                    )


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


def describe_files(folder: Path, known: dict[str, str] | None = None) -> dict[str, dict[str, Any]]:
    """{name: {"size", "sha256"}} of the files in `folder`; `known` has hashes that are computed already."""
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": (known or {}).get(name) or file_sha256(path)}
        if name == WEIGHTS:
            files[name]["sample_sha256"] = sample_sha256(path)
    return files


# --- writing ---------------------------------------------------------------------------------------------------


def require_writable(out: Path, force: bool) -> None:
    """Check, before any work, that a package can be put at `out`. Raises PopcompileError."""
    parent = out.absolute().parent
    if not parent.is_dir():
        raise PopcompileError(f"{out}: the folder {parent} does not exist; create it first")
    if out.is_symlink() or out.exists():
        if not force:
            raise PopcompileError(f"{out} exists already; give another folder, or --force to replace it")
        if not out.is_dir() or out.is_symlink():
            raise PopcompileError(f"{out} is no folder; --force replaces packages only")
        if any(out.iterdir()) and not (out / MANIFEST).is_file():
            raise PopcompileError(f"{out} is not a popcompile package; --force replaces packages only")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise PopcompileError(f"{out}: no permission to write in {parent}")
    try:
        probe = parent / f".{out.name}.probe-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise PopcompileError(f"{out}: cannot write in {parent} ({error.strerror})") from error


def require_disk_space(folder: Path, size: int) -> None:
    """Check that `size` bytes can be written below `folder`. Raises PopcompileError."""
    free = shutil.disk_usage(folder).free
    if free < size:
        raise PopcompileError(
            f"{folder.parent}: the disk is full, the weights need {size / 1e6:.0f} MB and {free / 1e6:.0f} MB are free;"
            " free some space and convert again"
        )


@contextmanager
def staged(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place, flushed and at once, when the block ends well.

    A process that is killed leaves `out` as it was, and a hidden folder that the next conversion removes.
    Raises PopcompileError where the disk is full or not writable.
    """
    out = out.absolute()
    _remove_abandoned(out)
    temporary = out.parent / f".{out.name}.partial-{os.getpid()}"
    try:
        temporary.mkdir()
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        _put_in_place(temporary, out)
        _flush(out.parent)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise PopcompileError(f"{out}: the disk is full; free some space and convert again") from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise PopcompileError(f"{out}: cannot be written ({error.strerror})") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle on a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, out: Path) -> None:
    """Rename; where a package is replaced, the two are exchanged in one step if the system can."""
    if not out.exists():
        temporary.rename(out)
        return
    if _exchange(temporary, out):
        return  # what was replaced is now under the temporary name, and is removed
    backup = out.parent / f".{out.name}.replaced-{os.getpid()}"
    out.rename(backup)
    temporary.rename(out)
    shutil.rmtree(backup, ignore_errors=True)


def _exchange(one: Path, other: Path) -> bool:
    """Linux's renameat2 with RENAME_EXCHANGE; False where there is none."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    at_fdcwd, rename_exchange = -100, 2
    return renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), rename_exchange) == 0


def _remove_abandoned(out: Path) -> None:
    """Remove what killed conversions left beside `out`; put back a package that one had moved aside."""
    for path in out.parent.glob(f".{out.name}.*-*"):
        kind, _, pid = path.name.removeprefix(f".{out.name}.").partition("-")
        if kind not in ("partial", "replaced") or not pid.isdigit() or _is_running(int(pid)):
            continue
        if kind == "replaced" and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _is_running(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
