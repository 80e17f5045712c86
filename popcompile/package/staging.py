"""How a package appears on disk: whole or not at all, in place of an older one only on request.

It is written into a hidden folder beside OUT, flushed, and renamed. What a killed process leaves behind is removed by
the next conversion to the same place. A package that is replaced is removed: so it must hold nothing else, no file that
its manifest does not list and nothing that the conversion reads.
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from popcompile.errors import PopcompileError
from popcompile.files import read_regular
from popcompile.package.integrity import MANIFEST, unlisted_files


def require_writable(out: Path, force: bool, *, copied: bool = False) -> None:
    """Check, before any work, that a package can be put at `out`. Raises PopcompileError.

    copied: what is there will be in the new one too.
    """
    place = _absolute(out)
    parent = place.parent
    try:
        if not parent.is_dir():
            raise PopcompileError(f"{out}: there is no folder {parent}; create it first")
        _require_replaceable(out, place, force, copied)
        if not os.access(parent, os.W_OK | os.X_OK):
            raise PopcompileError(f"{out}: no permission to write in {parent}; choose another place")
        probe = parent / f".{place.name}.probe-{os.getpid()}"
        probe.mkdir()
        probe.rmdir()
    except OSError as error:
        raise PopcompileError(f"{out}: cannot write in {parent} ({error.strerror}); choose another place") from error


def _require_replaceable(out: Path, place: Path, force: bool, copied: bool) -> None:
    if not (place.is_symlink() or place.exists()):
        return
    if not force:
        raise PopcompileError(f"{out} exists already; give another folder, or --force to replace it")
    if place.is_symlink() or not place.is_dir():
        raise PopcompileError(f"{out} is no folder, and --force replaces packages only; give another folder")
    if place.is_mount():
        raise PopcompileError(f"{out} is a mount point, which no folder can replace; give a folder in it")
    if _holds_current_folder(place):
        raise PopcompileError(f"{out} is or holds the folder that you are in; run the command from elsewhere")
    if any(place.iterdir()) and not (place / MANIFEST).is_file():
        raise PopcompileError(f"{out} is no package, and --force replaces packages only; give another folder")
    if any(place.iterdir()) and not copied:
        _require_only_a_package(out, place)


def require_apart(out: Path, inputs: Mapping[str, str | Path | None]) -> None:
    """Check that `out`, which may be replaced, holds none of the files and folders that are read.

    inputs: by how the user calls them. What is no path that exists, as a hub id, is none. Raises PopcompileError.
    """
    place = Path(os.path.realpath(out))
    for name, given in inputs.items():
        if given is None or not os.path.exists(given):
            continue
        path = Path(given)
        for read in (path, *(path.iterdir() if path.is_dir() else ())):  # files of a folder may be links
            if Path(os.path.realpath(read)).is_relative_to(place):
                raise PopcompileError(
                    f"{out}: {name} {given} is in it, and replacing it would remove that; give another folder"
                )


def _require_only_a_package(out: Path, place: Path) -> None:
    """Raises PopcompileError where the folder has anything else than the files of the package that it is."""
    try:
        files = json.loads(read_regular(place / MANIFEST, 64 << 20))["files"]
        listed = set(files) if isinstance(files, dict) else None
    except (OSError, ValueError, RecursionError, KeyError, TypeError):
        listed = None
    if listed is None:
        raise PopcompileError(
            f"{out}: its {MANIFEST} does not say which files are the package's; remove the folder, or give another"
        )
    for name in unlisted_files(place, listed):
        if Path(name).name not in _OF_DESKTOPS:
            raise PopcompileError(
                f"{out}: --force would remove {name}, which is not the package's; move it away, or give another folder"
            )


def _holds_current_folder(place: Path) -> bool:
    """A folder that is replaced is removed, and shells and this process would be left in one that is nowhere."""
    here = Path.cwd().resolve()
    return place.resolve() in (here, *here.parents)


def _absolute(out: Path) -> Path:
    return Path(os.path.abspath(out))


def require_disk_space(path: Path, size: int) -> None:
    """Check that `size` bytes can be written beside `path`. Raises PopcompileError."""
    parent = _absolute(path).parent
    free = shutil.disk_usage(parent).free
    if free < size:
        raise PopcompileError(
            f"{parent}: the disk is full, the weights need {size / 1e6:.1f} MB and {free / 1e6:.1f} MB are free;"
            " free some space and convert again"
        )


#: written by themselves wherever a folder is looked at
_OF_DESKTOPS = frozenset({".DS_Store", "Thumbs.db", "desktop.ini"})
_FULL = {
    errno.ENOSPC: "the disk is full; free some space and convert again",
    errno.EDQUOT: "the disk quota is used up; free some space and convert again",
    errno.EFBIG: "a file gets larger than this process or disk allows; raise the limit (ulimit -f) and convert again",
}
#: what the user can fix where writing fails, by errno; another OSError is a failure of ours
_WRITE_ERRORS = _FULL | {
    errno.EACCES: "no permission to write there; choose another place",
    errno.EPERM: "no permission to write there; choose another place",
    errno.EROFS: "the disk is read-only; choose another place",
    errno.EIO: "the disk fails (input/output error); choose another place",
    errno.EBUSY: "something is mounted there, which no folder can replace; give a folder in it",
    errno.EEXIST: "something appeared there meanwhile; give another folder, or --force to replace it",
    errno.ENOTEMPTY: "something appeared there meanwhile; give another folder, or --force to replace it",
}


@contextmanager
def staged(out: Path, force: bool = False, *, copied: bool = False) -> Iterator[Path]:
    """A temporary folder beside `out` that takes its place, flushed and at once, when the block ends well.

    A process that is killed leaves `out` as it was, and a hidden folder that the next conversion removes.
    copied: the block puts into the new folder what the old one has.
    Raises PopcompileError where the disk is full or not writable, or, without `force`, `out` exists by then.
    """
    place = _absolute(out)
    _remove_abandoned(place)
    temporary = place.parent / f".{place.name}.partial-{os.getpid()}"
    try:
        temporary.mkdir()
        yield temporary
        for path in (*temporary.rglob("*"), temporary):
            _flush(path)
        if force and not copied and place.is_dir() and any(place.iterdir()):
            _require_only_a_package(out, place)  # a conversion takes long enough to put something there
        _put_in_place(temporary, place, force)
        _flush(place.parent)
    except Exception as error:
        if message := _write_error(error, place):
            raise PopcompileError(f"{out}: {message}") from error
        raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def link_or_copy(source: str | Path, target: str | Path) -> None:
    """A hard link at `target`, or a copy where the file system has none or is another one.

    Not a symbolic link: ONNX Runtime refuses external data that leads out of the graph's folder.
    """
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _write_error(error: BaseException | None, place: Path) -> str | None:
    """The message for an exception that is, or was made from, a failure to write at `place`; None for any other."""
    while error is not None:
        if isinstance(error, OSError):
            beside = str(place.with_name(f".{place.name}."))
            ours = error.filename is None or f"{error.filename}{os.sep}".startswith((f"{place}{os.sep}", beside))
            return (_WRITE_ERRORS if ours else _FULL).get(error.errno or 0)
        if match := re.search(r"\(os error (\d+)\)", str(error)):  # the tokenizers library, written in Rust
            return _FULL.get(int(match[1]))
        error = error.__cause__
    return None


def _flush(path: Path) -> None:
    if os.name == "nt" and path.is_dir():
        return  # Windows has no handle on a folder
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _put_in_place(temporary: Path, out: Path, force: bool) -> None:
    """Rename; where a package is replaced, the two are exchanged in one step if the system can."""
    if not out.exists():
        temporary.rename(out)
        return
    if not force:
        raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(out))
    if _exchange(temporary, out):
        return  # what was replaced is now under the temporary name, and is removed
    backup = out.parent / f".{out.name}.replaced-{os.getpid()}"
    out.rename(backup)
    try:
        temporary.rename(out)
    except OSError:
        backup.rename(out)
        raise
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
    for path in list(out.parent.iterdir()):
        match = re.fullmatch(rf"\.{re.escape(out.name)}\.(partial|replaced|probe)-(\d{{1,9}})", path.name)
        if not match or _is_running(int(match[2])):
            continue
        kind = match[1]
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
