"""What a command that fails says: one line, and whether the user can fix it (exit status 2) or we have to (1)."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterable

from popcompile.errors import PopcompileError
from popcompile.loading import one_line

#: modules whose distribution has another name
_DISTRIBUTIONS = {
    "PIL": "pillow",
    "genai": "onnxruntime-genai-cuda",
    "google": "protobuf",
    "jinja2": "jinja2",
    "lm_eval": "lm-eval",
    "onnx_ir": "onnx-ir",
    "onnxruntime": "onnxruntime-gpu",
    "onnxruntime_genai": "onnxruntime-genai-cuda",
    "sklearn": "scikit-learn",
}

#: what the surroundings of a command can do to it, and how to fix that, by errno
_CAUSES = {
    errno.EACCES: "give this user the permission, or choose another place",
    errno.EPERM: "give this user the permission, or choose another place",
    errno.EROFS: "choose another place",
    errno.ENOSPC: "free some space",
    errno.EDQUOT: "free some space",
    errno.EFBIG: "raise the limit of file sizes (ulimit -f)",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
    errno.ENFILE: "close other programs",
    errno.ENOMEM: "free some memory",
    errno.EAGAIN: "raise the limit of processes (ulimit -u), or try again",
    errno.EIO: "the disk or the terminal fails; check it, or choose another place",
    errno.ENAMETOOLONG: "give a shorter name",
    errno.ELOOP: "its links lead in a circle; give another name",
    errno.ESTALE: "try again where the file system is there",
    errno.ETIMEDOUT: "try again where the file system is there",
    errno.EBUSY: "something else uses it; try again",
    errno.ETXTBSY: "something else uses it; try again",
}
#: of a path that the user gave
_OF_A_PATH = {
    errno.ENOENT: "it was removed meanwhile, or never was there; give another",
    errno.ENOTDIR: "give another",
    errno.EISDIR: "give another",
    errno.EEXIST: "give another",
    errno.ENXIO: "give a regular file",
    errno.EINVAL: "give another",
}
_OUT_OF_MEMORY = re.compile(r"can't allocate memory|allocate memory|bad_alloc|out of memory", re.IGNORECASE)


def what_to_fix(error: Exception, given: Iterable[str] = ()) -> str | None:
    """Cause and fix of an exception that the user can do something about; None for a failure of ours.

    given: paths among the command's arguments.
    """
    if isinstance(error, PopcompileError):
        return str(error)
    if isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _OUT_OF_MEMORY.search(str(error))):
        asked = f" ({one_line(error)})" if str(error) else ""
        return f"the memory does not suffice{asked}; free some, or give a smaller model or shorter texts"
    if isinstance(error, RecursionError):
        return "something in the input is nested too deeply; give a checkpoint or package without that"
    if isinstance(error, ImportError):
        return _import_error(error)
    return _os_error(error, given) if isinstance(error, OSError) else None


def output_failed(error: OSError) -> str:
    """Of stdout."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "the disk is full that the output goes to; free some space"
    return f"the output cannot be written ({error.strerror or one_line(error)}); send it elsewhere"


def _import_error(error: ImportError) -> str | None:
    module = (error.name or "").partition(".")[0]
    if module == "popcompile":
        return None
    name = _DISTRIBUTIONS.get(module, module.replace("_", "-"))
    command = f"pip install --force-reinstall {name}" if name else "install popcompile's dependencies again"
    return f"{module or 'a library'} cannot be imported ({one_line(error)}); {command}"


def _os_error(error: OSError, given: Iterable[str]) -> str | None:
    if error.errno is None:
        if "cannot open shared object file" in str(error) or "Library not loaded" in str(error):
            return f"a library is broken ({one_line(error)}); install popcompile's dependencies again"
        return None
    if error.errno == errno.ENOENT and error.filename is None and "temporary directory" in str(error):
        return f"{one_line(error)}; set TMPDIR to a folder that this user can write in"
    file = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes | os.PathLike) else ""
    if not file and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF):
        return output_failed(error)
    fix = _CAUSES.get(error.errno)
    if fix is None and file and any(_is_below(file, path) for path in given):
        fix = _OF_A_PATH.get(error.errno)
    if fix is None:
        return None
    return f"{file + ': ' if file else ''}{error.strerror}; {fix}"


def _is_below(file: str, path: str) -> bool:
    try:
        file, path = os.path.abspath(file), os.path.abspath(path)
    except (OSError, ValueError):
        return False
    return file == path or file.startswith(path.rstrip(os.sep) + os.sep)
