"""Load through transformers quietly, and report what it raises on bad input as one line of cause and mend."""

import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from popcompile.errors import PopcompileError


def read_json(model: str, path: Path) -> dict[str, Any]:
    """The JSON object in a file, or a `PopcompileError` that names the file."""
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise PopcompileError(f"{model}: {path.name} is not JSON: {one_line(error)}; mend or replace it") from error
    if not isinstance(content, dict):
        raise PopcompileError(f"{model}: {path.name} is not a JSON object; mend or replace it")
    return content


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
    except Exception as error:  # a malformed field raises anything in transformers, a bad tokenizer a bare Exception
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


@contextlib.contextmanager
def errors_only(*names: str) -> Iterator[None]:
    """Loggers without what is less than an error."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
