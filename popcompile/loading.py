"""Load through transformers quietly, and report what it raises on bad input as one line of cause and fix.

Files are read whole only where they are regular files of a size that such a file has: a pipe would be waited for, and
/dev/zero has no end. Links are followed; the hub's cache is made of them.
"""

import contextlib
import errno
import io
import json
import stat
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from popcompile.errors import PopcompileError
from popcompile.files import read_regular
from popcompile.quiet import errors_only

CONFIG_BYTES = 10 * 2**20
"""The largest config that is read; published ones have some kilobytes."""

TABLE_BYTES = 256 * 2**20
"""The largest vocabulary or list of tensors that is read; published ones have up to 40 MB."""

DEPTH = 64
"""How deep JSON may be nested: libraries copy and print configs recursively."""


def read_json(model: str, path: Path, limit: int = CONFIG_BYTES) -> dict[str, Any]:
    """The JSON object in a file of at most `limit` bytes, or a `PopcompileError` that names the file."""
    try:
        content = json.loads(read_file(model, path, limit))
        if _nested(content, DEPTH):
            raise PopcompileError(f"{model}: {path.name} is nested more than {DEPTH} deep; fix or replace it")
        json.dumps(content, ensure_ascii=False).encode()  # what cannot be written: half of a surrogate pair
    except (ValueError, RecursionError) as error:
        raise PopcompileError(f"{model}: {path.name} is not JSON: {one_line(error)}; fix or replace it") from error
    if not isinstance(content, dict):
        raise PopcompileError(f"{model}: {path.name} is not a JSON object; fix or replace it")
    return content


def read_file(model: str, path: Path, limit: int) -> bytes:
    """A regular file's bytes. Raises PopcompileError where it is none, has more than `limit`, or cannot be read."""
    require_regular(model, path)
    try:
        return read_regular(path, limit)
    except PermissionError as error:
        raise PopcompileError(f"{model}: permission denied reading {path}; make it readable for this user") from error
    except OSError as error:
        if error.errno == errno.EFBIG:
            size = f"{path.name} has more than {limit:,} bytes"
            raise PopcompileError(f"{model}: {size}; give the one of the checkpoint") from error
        raise PopcompileError(f"{model}: {path.name} cannot be read ({error.strerror}); replace it") from error


def require_regular(model: str, path: Path) -> None:
    """Raise PopcompileError where there is something at `path` that is no regular file, or link to one."""
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        mode = path.stat().st_mode
        if not stat.S_ISREG(mode):
            what = "a folder" if stat.S_ISDIR(mode) else "a pipe or device"
            raise PopcompileError(f"{model}: {path.name} is {what}, not a regular file; replace it")


def _nested(content: Any, depth: int) -> bool:
    """Whether JSON is nested deeper; without recursion."""
    level = [content]
    for _ in range(depth):
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]
    return any(isinstance(left, dict | list) for left in level)


def one_line(error: BaseException, limit: int = 200) -> str:
    """An error's message on one line of at most `limit` characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 3] + "..."


@contextlib.contextmanager
def reading(model: str, problem: str) -> Iterator[None]:
    """Turn what transformers raises on bad input into a `PopcompileError` that names `model` and `problem`."""
    try:
        yield
    except (PopcompileError, PermissionError):
        raise
    except BaseException as error:  # a malformed field raises anything in transformers, a bad tokenizer even a panic
        if not isinstance(error, Exception) and type(error).__module__ != "pyo3_runtime":
            raise
        raise PopcompileError(f"{model}: {problem}: {one_line(error)}") from error


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and warnings of transformers, tqdm and the hub client off a stderr that is no terminal."""
    if sys.stderr.isatty():
        yield
        return
    with (
        contextlib.redirect_stderr(io.StringIO()),
        warnings.catch_warnings(action="ignore"),
        errors_only("transformers", "huggingface_hub"),
    ):
        yield
