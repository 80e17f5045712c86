"""Regular files alone, wherever a user names one, so that nothing waits for a pipe or reads a device; and paths that
the libraries below can open.
"""

from __future__ import annotations

import errno
import os
import stat
from io import BufferedReader
from pathlib import Path

from popcompile.errors import PopcompileError

_FLAGS = os.O_RDONLY | sum(getattr(os, name, 0) for name in ("O_NONBLOCK", "O_NOCTTY", "O_CLOEXEC", "O_BINARY"))


def open_regular(path: Path | str) -> BufferedReader:
    """The file at `path`, for reading. Raises OSError, for a folder, a pipe, a socket or a device too."""
    _require_regular(path, os.stat(path))  # a device may do something as soon as it is opened
    descriptor = os.open(path, _FLAGS)
    try:
        _require_regular(path, os.fstat(descriptor))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_regular(path: Path | str, limit: int) -> bytes:
    """The bytes of the file at `path`, at most `limit`. Raises OSError, for a longer one too."""
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"larger than {limit >> 20} MB", str(path))
    return content


def _require_regular(path: Path | str, status: os.stat_result) -> None:
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "not a regular file", str(path))


def require_utf8(path: str | Path) -> None:
    """Check that ONNX Runtime, safetensors and tokenizers, which take paths as UTF-8 text, can open a folder or file.

    Python opens others as well: text, plots and pages may stand anywhere. Raises PopcompileError.
    """
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError:
        raise PopcompileError(
            f"{path}: its name is not UTF-8, and ONNX Runtime, safetensors and tokenizers open no such path; rename it"
        ) from None


def stamps(path: str | Path) -> list[list[str | int]]:
    """Name, bytes and time of change of a file, or of each file of a folder. Of what is no path, as hub ids, none."""
    place = Path(path)
    files = sorted(place.iterdir()) if place.is_dir() else [place] if place.is_file() else []
    return [[file.name, status.st_size, status.st_mtime_ns] for file in files for status in (file.stat(),)]
