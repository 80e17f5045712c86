"""How far a command is: a bar on a terminal, lines in a log, and nothing where it is short."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest

from popcompile import progress

CODE = """
from popcompile.progress import CONVERT_STEPS, progress_bar
with progress_bar(CONVERT_STEPS) as progress:
    progress("trace", 0, 1)
    progress("weights", 1, 2)
    progress("choose", 1, 2)
"""


def test_bar_on_a_terminal() -> None:
    master, slave = pty.openpty()
    fcntl.ioctl(slave, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 100, 0, 0))
    subprocess.run([sys.executable, "-c", CODE], stderr=slave, check=True, timeout=60)
    os.close(slave)
    shown = b""
    try:
        while part := os.read(master, 65536):
            shown += part
    except OSError:  # Linux reports the end of a closed terminal so
        pass
    finally:
        os.close(master)
    assert b"trace" in shown and b"weights" in shown and b"97%" in shown
    assert b"choose" in shown and b"45%" not in shown, "it does not run backwards"


def test_nothing_elsewhere_while_it_is_short() -> None:
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, check=True, timeout=60)
    assert result.stderr == result.stdout == b""


def test_lines_elsewhere() -> None:
    """One for every two minutes at most, here for each of no length."""
    code = f"import popcompile.progress; popcompile.progress.LINES_EVERY = 0\n{CODE}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    expected = ["trace, 0%", "weights, 97%", "choose, 97%"]
    assert result.stderr.splitlines() == [f"popcompile: {step} after 00:00" for step in expected]
    assert result.stdout == ""


def test_seconds_of_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """From one report to the next they are of the step that was reported first."""
    clock = iter([0.0, 1.0, 3.0, 4.0, 9.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    reported: list[tuple[str, int, int]] = []
    times = progress.StepTimes(lambda *report: reported.append(report))
    for report in (("trace", 0, 1), ("choose", 0, 2), ("choose", 1, 2), ("done", 1, 1)):
        times(*report)
    assert times.seconds == {"trace": 2.0, "choose": 6.0}
    assert [step for step, *_ in reported] == ["trace", "choose", "choose", "done"]
