"""Whether the files of a package are the ones that its manifest means.

What finds which damage:

    every use       a missing file, a changed byte in any file but the weights; of the weights the size and 64 samples,
                    which tells two models apart. A file that the manifest does not list; a link that leads out; a pipe
                    or a device in a file's place; code
    verify          also every byte of the weights: `check_files(full=True)`

Nothing is used but what was checked: `read_file` returns the bytes that it hashed, and `open_weights` the file whose
samples it hashed, for good, whatever takes its place in the folder.

A package is the files of its manifest, and no others. transformers, tokenizers and onnxruntime-genai look for files by
names and patterns that change with their versions (chat_template.jinja, additional_chat_templates/, added_tokens.json),
so that any file more may change what is answered. Exceptions are what nobody reads by its name, and what people,
desktops, the hub and our own --html put into a folder: names that begin with a dot, `_IGNORED`, and pages and pictures.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Container, Iterator
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, Any

from popcompile.errors import PopcompileError
from popcompile.files import open_regular

if TYPE_CHECKING:
    from popcompile.package.manifest import Manifest

MANIFEST = "popcompile.json"
#: unlisted files that are no fault, besides hidden ones
_IGNORED = frozenset({"LICENSE", "LICENSE.txt", "Thumbs.db", "desktop.ini"})
_IGNORED_ENDS = (".html", ".md", ".svg", ".png")
#: bytes, at most, of files that are read whole, by how their names end, the first that fits; what ONNX and JSON take in
#: memory is up to fifty times as much
_LIMITS = {".onnx": 32 << 20, "tokenizer.json": 256 << 20, ".json": 16 << 20, "": 256 << 20}
_TOTAL_LIMIT = 1 << 30
#: fields with which a config of transformers names code beside it
CODE_FIELDS = ("auto_map", "custom_pipelines")
_AGAIN = "convert the model again"
_SAMPLES, _SAMPLE_BYTES = 64, 65536


def check_files(folder: Path, manifest: Manifest, *, full: bool = False) -> None:
    """Check that the package has every file of its manifest, each the one that is meant, and no other.

    All are hashed, but of the weights only samples are; `full` hashes the weights too.
    Raises PopcompileError naming the first file that differs.
    """
    check_small_files(folder, manifest)
    open_weights(folder, manifest, full=full).close()


def check_small_files(folder: Path, manifest: Manifest) -> None:
    """What `check_files` checks, but for the weights."""
    require_only_listed(folder, manifest.files)
    sizes = [entry["size"] for name, entry in manifest.files.items() if name != manifest.weights]
    if sum(sizes) > _TOTAL_LIMIT:
        raise PopcompileError(f"{folder}: its files besides the weights are larger than 1 GB; {_AGAIN}")
    for name in manifest.files:
        if name != manifest.weights:
            read_file(folder, manifest, name)


def read_file(folder: Path, manifest: Manifest, name: str) -> bytes:
    """The bytes of a file of the package, which are those that the manifest means, and no code.

    Raises PopcompileError.
    """
    entry = manifest.files[name]
    limit = next(size for end, size in _LIMITS.items() if name.endswith(end))
    if entry["size"] > limit:
        raise PopcompileError(f"{folder}: {name} is larger than {limit >> 20} MB, as none is; {_AGAIN}")
    try:
        with _open(folder, name, entry) as file:
            content = file.read(entry["size"] + 1)
    except OSError as error:
        raise _unreadable(folder, name, error) from error
    if len(content) != entry["size"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise _changed(folder, name)
    _require_no_code(folder, name, content)
    return content


def open_weights(folder: Path, manifest: Manifest, *, full: bool = False) -> BufferedReader:
    """The package's data file, checked: samples of it or, if `full`, every byte. Raises PopcompileError."""
    name, entry = manifest.weights, manifest.files[manifest.weights]
    try:
        file = _open(folder, name, entry)
        try:
            if full or "sample_sha256" not in entry:
                same = hashlib.file_digest(file, "sha256").hexdigest() == entry["sha256"]
            else:
                same = _sample_sha256(file) == entry["sample_sha256"]
            if not same:
                raise _changed(folder, name)
        except BaseException:
            file.close()
            raise
    except OSError as error:
        raise _unreadable(folder, name, error) from error
    return file


def _open(folder: Path, name: str, entry: dict[str, Any]) -> BufferedReader:
    """The file `name`, of the size that the manifest gives. Raises OSError, PopcompileError."""
    real = os.path.realpath(folder / name)
    if not Path(real).is_relative_to(os.path.realpath(folder)):
        raise PopcompileError(f"{folder}: {name} is a link that leads out of the package; put the file itself there")
    try:
        file = open_regular(real)
    except (FileNotFoundError, NotADirectoryError):
        raise PopcompileError(f"{folder}: {name} is missing; {_AGAIN}") from None
    except IsADirectoryError:
        raise _changed(folder, name) from None
    if os.fstat(file.fileno()).st_size != entry["size"]:
        file.close()
        raise _changed(folder, name)
    return file


def _changed(folder: Path, name: str) -> PopcompileError:
    return PopcompileError(
        f"{folder}: {name} is not the file that this package was made with (changed, damaged, or of another"
        f" package); {_AGAIN}"
    )


def _unreadable(folder: Path, name: str, error: OSError) -> PopcompileError:
    if error.errno is not None and error.strerror == "not a regular file":
        return PopcompileError(f"{folder}: {name} is not a regular file; {_AGAIN}")
    return PopcompileError(f"{folder}: {name} cannot be read ({error.strerror}); make it readable for this user")


def _require_no_code(folder: Path, name: str, content: bytes) -> None:
    """transformers would run what `auto_map` names, or ask on the terminal whether it may."""
    if name.endswith(".py"):
        raise PopcompileError(f"{folder}: has code, {name}, which no package needs; do not use it, {_AGAIN}")
    if not name.endswith("config.json"):
        return
    try:
        config = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise PopcompileError(f"{folder}: {name} is not JSON; {_AGAIN}") from error
    if not isinstance(config, dict):
        raise PopcompileError(f"{folder}: {name} is not a JSON object; {_AGAIN}")
    if fields := [field for field in CODE_FIELDS if config.get(field)]:
        raise PopcompileError(
            f"{folder}: {name} asks to run code ({fields[0]}), which no package needs; do not use it, {_AGAIN}"
        )
    for field, value in config.items():
        if name == "tokenizer_config.json" and field.endswith("_file") and isinstance(value, str):
            raise PopcompileError(f"{folder}: {name} names a file of its own ({field}); do not use it, {_AGAIN}")


# --- what is in the folder -------------------------------------------------------------------------------------


def require_only_listed(folder: Path, listed: Container[str]) -> None:
    """Raises PopcompileError where the folder has a file that its manifest does not list and that may be read."""
    for name in unlisted_files(folder, listed):
        parts = name.split("/")
        ignored = parts[-1] in _IGNORED or parts[-1].endswith(_IGNORED_ENDS)
        if not ignored and not any(part.startswith(".") for part in parts):
            raise PopcompileError(
                f"{folder}: has {name}, which its manifest does not list and which may change what it answers;"
                " remove it"
            )


def unlisted_files(folder: Path, listed: Container[str]) -> Iterator[str]:
    """Names of all that is in the folder, but for folders, its manifest and what it lists. Raises PopcompileError."""
    pending = [""]
    while pending:
        below = pending.pop()
        try:
            with os.scandir(folder / below) as entries:
                found = sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
        except OSError as error:
            raise _unreadable(folder, below or ".", error) from error
        for base, is_folder in found:
            name = f"{below}/{base}" if below else base
            if is_folder:
                pending.append(name)
            elif name != MANIFEST and name not in listed:
                yield name


# --- hashes ----------------------------------------------------------------------------------------------------


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sample_sha256(file: BufferedReader) -> str:
    """SHA-256 over evenly spaced pieces of a file: tells two models' weights apart without reading gigabytes."""
    size = os.fstat(file.fileno()).st_size
    digest = hashlib.sha256(str(size).encode())
    for i in range(_SAMPLES):
        file.seek(max(size - _SAMPLE_BYTES, 0) * i // (_SAMPLES - 1))
        digest.update(file.read(_SAMPLE_BYTES))
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
            with path.open("rb") as file:
                files[name]["sample_sha256"] = _sample_sha256(file)
    return files
