"""Commands in processes of their own that have imported everything before they start: copies of one that did nothing
else. What they print, their exit status and what they leave is that of a process, without the seconds of its imports.

The process that is copied runs this file: a line of JSON on stdin asks for a copy, and one on stdout says how it ended.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

#: seconds; it ends what hangs, also on a machine that does much else
TIMEOUT = 600
#: numpy and ONNX Runtime start threads when they are imported, and those are not copied
NO_THREADS = {"OMP_NUM_THREADS": "1", "ORT_DISABLE_TELEMETRY": "1"}
#: what most commands import
COMMANDS = (
    "popcompile.cli", "popcompile.conversion", "transformers.models.llama.modeling_llama", "onnxscript",
    "torch._dynamo",
)  # fmt: skip


class Forks:
    """While the block runs. All copies have what libraries read from the environment when they are imported."""

    def __init__(self, imported: Iterable[str], environment: Mapping[str, str] | None = None) -> None:
        """imported: modules. environment: of the process that is copied, by default this one's.

        Where no process can be copied, on Windows, each command is one that imports everything itself.
        """
        self._environment = dict(os.environ if environment is None else environment) | NO_THREADS
        self._process: subprocess.Popen[str] | None = None
        if hasattr(os, "fork"):
            command = [sys.executable, __file__, *imported]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self._environment
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()

    def python(self, code: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """`python -c CODE ARGUMENTS...`, with these variables changed in its environment."""
        command = ["-c", *map(str, arguments)]
        if self._process is None:
            whole = [sys.executable, "-c", code, *command[1:]]
            changed = self._environment | environment
            return subprocess.run(whole, env=changed, capture_output=True, text=True, timeout=TIMEOUT)
        with tempfile.TemporaryDirectory() as folder:
            request = {"code": code, "command": command, "environment": environment, "folder": folder}
            assert self._process.stdin is not None and self._process.stdout is not None
            print(json.dumps(request), file=self._process.stdin, flush=True)
            status = int(self._process.stdout.readline())
            said = [(Path(folder) / name).read_text(encoding="utf-8") for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(command, status, *said)

    def script(self, file: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """`python FILE ARGUMENTS...`."""
        code = f"import runpy; runpy.run_path({str(file)!r}, run_name='__main__')"
        return self.python(code, *arguments, **environment)

    def popcompile(self, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
        """`popcompile ARGUMENTS...`."""
        return self.python("import sys; from popcompile.cli import main; sys.exit(main())", *arguments, **environment)


def prepare(imported: Iterable[str]) -> None:
    """Import what copies of this process need. Nothing is computed: threads are not copied."""
    for name in imported:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    assert sys.platform != "linux" or len(os.listdir("/proc/self/task")) == 1, "a thread runs"
    gc.collect()
    gc.freeze()  # so that a copy's first collection does not write to every page


def _serve() -> dict[str, Any] | None:
    """Answer requests until stdin ends. In each copy it returns what was asked for."""
    with os.fdopen(os.dup(0)) as requests, os.fdopen(os.dup(1), "w") as replies:
        _redirect(os.devnull, 0)
        os.dup2(2, 1)
        for line in requests:
            if (copy := os.fork()) == 0:
                return dict(json.loads(line))
            _, status = os.waitpid(copy, 0)
            print(os.waitstatus_to_exitcode(status), file=replies, flush=True)
    return None


def _redirect(file: str | Path, descriptor: int) -> None:
    opened = os.open(file, os.O_RDWR | os.O_CREAT, 0o600)
    os.dup2(opened, descriptor)
    os.close(opened)


def _become(request: dict[str, Any]) -> None:
    """The process that was asked for, up to its code."""
    if hasattr(signal, "alarm"):
        signal.alarm(TIMEOUT)
    os.environ |= request["environment"]
    sys.argv = request["command"]
    for descriptor, name in enumerate(("stdout", "stderr"), 1):
        _redirect(Path(request["folder"]) / name, descriptor)


if __name__ == "__main__":
    prepare(sys.argv[1:])
    if (request := _serve()) is not None:
        _become(request)
        exec(compile(request["code"], "<string>", "exec"), {"__name__": "__main__"})
