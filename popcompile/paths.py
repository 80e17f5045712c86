"""Paths that libraries below open."""

from __future__ import annotations

import os
from pathlib import Path

from popcompile.errors import PopcompileError


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
