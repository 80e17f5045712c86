"""Silence for libraries that log what no user can act on. It imports nothing of popcompile: every folder may use it."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


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


@contextlib.contextmanager
def logging_kept() -> Iterator[None]:
    """The root logger stays as it is, whatever an import does: that of ONNX Runtime's quantizer sets it up at INFO."""
    root, handler = logging.getLogger(), logging.NullHandler()
    root.addHandler(handler)  # logging.basicConfig leaves a logger alone that has one
    try:
        yield
    finally:
        root.removeHandler(handler)
