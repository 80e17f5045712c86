"""Run cases, each in a process forked from one that has imported everything, a few at a time, and watch them.

Nothing is computed before forking: libraries that have started threads cannot be forked.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fuzz import adapters, checkpoints, ggufs, graphs, packages, places
from fuzz.case import Maker, Workspace
from fuzz.judge import PASSED_OVER, SECONDS, Ended, judge, read
from fuzz.worker import work

KINDS: dict[str, Maker] = {
    "package": packages.make,
    "graph": graphs.make,
    "config": checkpoints.make_config,
    "checkpoint": checkpoints.make,
    "adapter": adapters.make,
    "gguf": ggufs.make,
    "place": places.make,
}
#: what commands import when they run
USED = [
    "popcompile.cli", "popcompile.conversion", "popcompile.runtime.chat", "popcompile.report.inspection",
    "popcompile.runtime.verify", "popcompile.report.page", "popcompile.evaluation.compare",
    "popcompile.report.evaluation", "popcompile.frontend.adapter", "popcompile.frontend.gguf",
    "popcompile.pruning.analyze", "popcompile.report.plots", "peft", "gguf", "accelerate",
    "transformers.models.llama.modeling_llama", "transformers.integrations.ggml",
    "transformers.modeling_gguf_pytorch_utils",
    "torch.export", "torch._dynamo", "torch.onnx._internal.exporter._core", "bad_input", "fuzz.bases",
]  # fmt: skip


_PR_SET_PDEATHSIG = 1


@dataclass
class Outcome:
    kind: str
    seed: int
    outcome: str
    wrong: list[str]
    seconds: float
    cpu: float
    growth: int
    case: dict[str, Any]
    stderr: str


@dataclass
class _Running:
    kind: str
    seed: int
    root: Path
    log: Path
    pid: int
    started: float = field(default_factory=time.monotonic)
    seconds: float = 0.0
    stopped: bool = False


def apart(call: Callable[[], None]) -> None:
    """Run a call in a process of its own. Raises ChildProcessError where it fails."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            call()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    if os.waitpid(pid, 0)[1]:
        raise ChildProcessError("could not make the undamaged inputs")


def run(
    cases: Iterator[tuple[str, int]], count: int, bases: Path, place: Path, jobs: int, *, keep: bool, quick: bool
) -> Iterator[Outcome]:
    """Run the first `count` (kind, seed) cases, `jobs` at a time; outcomes come as they end.

    quick: of those that trace a model take one in eight, and others in place of the rest.
    """
    running: list[_Running] = []
    while count or running:
        while len(running) < min(jobs, count + len(running)):
            count -= 1
            running.append(_start(*next(cases), bases, place, quick))
        for one in list(running):
            pid, status, usage = os.wait4(one.pid, os.WNOHANG)
            if not pid:
                _watch(one)
                continue
            running.remove(one)
            outcome = _ended(one, status, usage, keep)
            if outcome.outcome == PASSED_OVER:
                count += 1
            else:
                yield outcome
        time.sleep(0.005)


def _start(kind: str, seed: int, bases: Path, place: Path, quick: bool) -> _Running:
    root, log = place / f"{kind}-{seed}", place / f"{kind}-{seed}.log"
    for folder in (root, log):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    pid = os.fork()
    if pid == 0:
        try:
            os.setsid()
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            work(KINDS[kind], f"{kind} {seed}", Workspace(root, bases), log, quick and seed % 8 != 0)
        except BaseException:
            (log / "harness").write_text(traceback.format_exc())
        finally:
            os._exit(0)
    return _Running(kind, seed, root, log, pid)


def _watch(one: _Running) -> None:
    """Stop a process that has had its time. Waiting for a core is not counted, waiting for anything else is."""
    try:
        queued = int(Path(f"/proc/{one.pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, IndexError):
        queued = 0.0
    seconds = time.monotonic() - one.started - queued
    if not (one.log / "ended").exists():
        one.seconds = seconds
    if seconds > SECONDS * (4 if (one.log / "ended").exists() else 1) and not one.stopped:
        one.stopped = True
        os.killpg(one.pid, signal.SIGKILL)


def _ended(one: _Running, status: int, usage: Any, keep: bool) -> Outcome:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(one.pid, signal.SIGKILL)  # what it started
    name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else ""
    peak = (read(one.log / "result.json") or {}).get("peak") or usage.ru_maxrss * 1024
    ended = Ended(name, one.seconds, peak - _resident(), one.stopped and not (one.log / "ended").exists())
    word, wrong = judge(ended, one.log, one.root)
    if (one.log / "harness").exists():
        wrong.append((one.log / "harness").read_text())
    stderr = (one.log / "stderr").read_text(errors="replace") if (one.log / "stderr").exists() else ""
    case = read(one.log / "case.json") or {"words": "", "command": []}
    cpu = usage.ru_utime + usage.ru_stime
    outcome = Outcome(one.kind, one.seed, word, wrong, one.seconds, cpu, ended.growth, case, stderr)
    if not keep:
        shutil.rmtree(one.root, ignore_errors=True)
        shutil.rmtree(one.log, ignore_errors=True)
    return outcome


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
