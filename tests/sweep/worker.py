"""A process that takes cases one after another, and is started again after a crash or a case that takes too long."""

from __future__ import annotations

import resource
import shutil
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

#: bytes that a case may take
MEMORY = 4 << 30


@dataclass(frozen=True)
class Case:
    """A model type with changes of its tiny config. variant: a name for these."""

    model_type: str
    variant: str
    changes: Mapping[str, Any]

    @property
    def name(self) -> str:
        return f"{self.model_type}: {self.variant}"


@dataclass(frozen=True)
class Result:
    """What became of a case.

    outcome: "works", "refused", or else "wrong", "internal error", "no reference", "hang", "crash". detail: the errors
    of the comparisons, or the line. where: a refusal's, "config" or "conversion".
    """

    outcome: str
    detail: str
    where: str = ""
    seconds: float = 0.0


class Worker:
    """Runs cases in a process of its own. limit: seconds for a case."""

    def __init__(self, limit: float) -> None:
        self._limit = limit
        self._folder = tempfile.mkdtemp(prefix="popcompile-sweep-")
        self._context = get_context("spawn")
        self._process: Any = None

    def run(self, case: Case) -> Result:
        if self._process is None:
            self._connection, theirs = self._context.Pipe()
            self._process = self._context.Process(target=_serve, args=(theirs, self._folder), daemon=True)
            self._process.start()
            theirs.close()
        try:
            self._connection.send(case)
            if self._connection.poll(self._limit):
                return self._connection.recv()
            result = Result("hang", f"no answer in {self._limit:.0f} s")
        except (EOFError, OSError):
            self._process.join(5)
            result = Result("crash", f"the process ended with {self._process.exitcode}")
        self._stop()
        return result

    def close(self) -> None:
        self._stop()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None


def _serve(connection: Connection, folder: str) -> None:
    """Answer cases until the other end is closed."""
    from .comparison import result_of

    resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
    while True:
        try:
            case = connection.recv()
        except EOFError:
            return
        started = time.monotonic()
        with tempfile.TemporaryDirectory(dir=folder) as place:
            outcome, detail, where = result_of(case, Path(place))
        connection.send(Result(outcome, detail, where, round(time.monotonic() - started, 1)))
