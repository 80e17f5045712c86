"""A file that a command writes where the user says: checked before the work, and put there whole."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

from popcompile.errors import PopcompileError


def require_output_file(option: str, path: Path) -> None:
    """Check, before any work, that a file can be written at `path`, the value of `option`. Raises PopcompileError."""
    try:
        if not path.parent.is_dir():
            raise PopcompileError(f"{option} {path}: there is no folder {path.parent}; create it first")
        if path.exists() and path.is_dir():
            raise PopcompileError(f"{option} {path}: is a folder; give a file name")
        if not os.access(path if path.exists() else path.parent, os.W_OK):
            raise PopcompileError(f"{option} {path}: no permission to write there; choose another place")
        path.lstat()
    except FileNotFoundError:
        pass  # a new file
    except ValueError as error:
        raise PopcompileError(f"{option} {path}: has a null character; give a name without") from error
    except OSError as error:
        raise _cannot_write(option, path, error) from error


def require_replaceable_file(option: str, path: Path) -> None:
    """Check, before any work, that `replace_file` can write at `path`. Raises PopcompileError."""
    require_output_file(option, path)
    place = Path(os.path.realpath(path))
    if path.is_symlink():
        require_output_file(option, place)
    if place.exists() and not place.is_file():
        raise PopcompileError(f"{option} {path}: is no regular file; give a file name")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise PopcompileError(f"{option} {path}: no permission to write in {place.parent}; choose another place")


def replace_file(option: str, path: Path, content: str | bytes) -> None:
    """Write `content`, text in UTF-8, at `path` in one step: what is there stays as it is until all is written.

    Raises PopcompileError where it cannot be written.
    """
    if isinstance(content, str):
        content = content.encode(errors="backslashreplace")
    place = Path(os.path.realpath(path))  # of a link, the file that it names
    temporary = place.parent / f".popcompile-{os.getpid()}.partial"
    try:
        try:
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            if place.exists():
                shutil.copymode(place, temporary)
            temporary.replace(place)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _cannot_write(option, path, error) from error


_FIXES = {
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
}


def _cannot_write(option: str, path: Path, error: OSError) -> PopcompileError:
    fix = _FIXES.get(error.errno or 0, "choose another place")
    return PopcompileError(f"{option} {path}: cannot be written ({error.strerror}); {fix}")
