"""How much memory a process holds: its resident set, and the anonymous part of it, which no file can give back."""

from __future__ import annotations

import threading
from pathlib import Path
from types import TracebackType

import psutil

_STATUS = Path("/proc/self/status")
_INTERVAL = 0.02  # seconds


def anonymous_bytes() -> int | None:
    """Anonymous memory of this process in bytes; None where the system does not report it (only Linux does)."""
    return _status("RssAnon:")


def peak_bytes() -> int | None:
    """The largest resident set of this process so far; None where the system does not say (Linux and Windows do)."""
    if (peak := _status("VmHWM:")) is not None:
        return peak
    return getattr(psutil.Process().memory_info(), "peak_wset", None)


def _status(field: str) -> int | None:
    try:
        lines = _STATUS.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(field)), None)


class AnonymousPeak:
    """The most anonymous memory that this process holds while the block runs, sampled every 20 ms; `bytes` after it."""

    def __enter__(self) -> AnonymousPeak:
        self.bytes = anonymous_bytes()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._done.set()
        self._thread.join()
        self._sample()

    def _watch(self) -> None:
        while not self._done.wait(_INTERVAL):
            self._sample()

    def _sample(self) -> None:
        now = anonymous_bytes()
        if now is not None:
            self.bytes = max(now, self.bytes or 0)
