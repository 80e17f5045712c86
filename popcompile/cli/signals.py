"""Signals that end a process end a command as Ctrl-C does: files that are half written and processes are cleaned up."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn


class Terminated(SystemExit):
    """A signal asks the process to end. Its code is the exit status that shells give: 128 and the signal's number."""


@contextlib.contextmanager
def terminated() -> Iterator[None]:
    """SIGTERM and SIGHUP raise Terminated in the block, once; more of them do not interrupt the cleaning up.

    Only where they would end the process: `nohup` ignores SIGHUP, and a program that calls the command line may have
    handlers of its own. Python lets the main thread alone set handlers; in another one nothing changes.
    """
    previous = {}
    if threading.current_thread() is threading.main_thread():
        for name in ("SIGTERM", "SIGHUP"):  # Windows has no SIGHUP
            number = getattr(signal, name, None)
            if number is not None and signal.getsignal(number) is signal.SIG_DFL:
                previous[number] = signal.signal(number, _end)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    for name in ("SIGTERM", "SIGHUP"):
        if (other := getattr(signal, name, None)) is not None and signal.getsignal(other) is _end:
            signal.signal(other, signal.SIG_IGN)
    raise Terminated(128 + number)
