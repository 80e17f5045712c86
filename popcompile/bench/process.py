"""The parent's side of a benchmark's worker processes (worker.py): start, ask, and say why one ended."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import tempfile
from types import TracebackType
from typing import Any, Self

from popcompile.bench.subjects import Subject
from popcompile.errors import PopcompileError
from popcompile.package.manifest import MANIFEST

_COMMAND = [sys.executable, "-P", "-m", "popcompile.bench.worker"]  # -P: no module of the current folder is imported


class WorkerProcess:
    """A process for one subject; ends with the block."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self._open = contextlib.ExitStack()
        errors = tempfile.TemporaryFile()  # noqa: SIM115 - it lives as long as the process
        self._errors = self._open.enter_context(errors)
        command, pipe = subject.command or _COMMAND, subprocess.PIPE
        try:
            process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._errors, encoding="utf-8")
        except OSError as error:
            raise PopcompileError(
                f"{subject.name}: {command[0]} does not start ({error.strerror}); give a command that does"
            ) from error
        self._process = self._open.enter_context(process)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._process.kill()
        with contextlib.suppress(OSError):  # a request that could not be sent any more
            self._open.close()

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request. Raises PopcompileError, naming the subject, where there is none or it is an error."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise PopcompileError(f"{self.subject.name}: {self._end()}")
        reply = json.loads(line)
        if "error" in reply:
            text = " ".join(reply["error"].split())
            reason = text if reply["fixable"] else f"{text[:300]}; {self._fix}"
            raise PopcompileError(reason if reason.startswith(self.subject.name) else f"{self.subject.name}: {reason}")
        return reply

    @property
    def _fix(self) -> str:
        if (self.subject.path / MANIFEST).is_file():
            return "give shorter --lengths if memory is short, or convert the model again"
        return "build it again, or leave it out of --against" if self.subject.required else "left out"

    def _end(self) -> str:
        """Why the process is not there any more."""
        status = self._process.wait()
        if status == -9:
            return "its process was killed, most likely for want of memory; give shorter --lengths or a smaller --batch"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        ended = f"by signal {-status}" if status < 0 else f"with status {status}"
        return f"its process ended {ended}{f' ({last[:200]})' if last else ''}; {self._fix}"
