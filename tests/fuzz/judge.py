"""Whether what came of a case is right."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS = 20.0
GROWTH = 2 << 30
LINE = 20_000
PASSED_OVER = "passed over"
#: what a command that succeeds may say on stderr
_SAID = re.compile(
    r"(> )*(\d+ prompt tokens, (pop|full) prefill: time to first token \d+ ms(, [\d.]+ tokens/s)? \(\d+ new tokens\))?"
    r"|popcompile: no pruning meets the budget .*"
)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")


@dataclass
class Ended:
    """How a case's process ended. signal: its name, or "". seconds: without those that it waited for a core."""

    signal: str
    seconds: float
    growth: int
    timed_out: bool


def judge(ended: Ended, log: Path, root: Path) -> tuple[str, list[str]]:
    """The outcome in a word, and what is wrong about it."""
    case = read(log / "case.json")
    if case is None:
        return "no case", ["the harness could not make the case"]
    if (log / "passed_over").exists():
        return PASSED_OVER, []
    result: dict[str, Any] = read(log / "result.json") or {}
    command_ended = (log / "ended").exists()
    stderr = (log / "stderr").read_text(encoding="utf-8", errors="replace") if (log / "stderr").exists() else ""
    stdout = (log / "stdout").read_text(encoding="utf-8", errors="replace") if (log / "stdout").exists() else ""
    wrong: list[str] = []
    if (root / "ran").exists():
        wrong.append(f"foreign code ran: {', '.join(sorted(p.name for p in (root / 'ran').iterdir()))}")
    if ended.timed_out:
        return "hang", [*wrong, f"still running after {ended.seconds:.0f} s"]
    if ended.growth > GROWTH:
        wrong.append(f"grew by {ended.growth / 1e9:.1f} GB")
    if not result:
        where = "the check after the command" if command_ended else "the command"
        return "died", [*wrong, f"{where} died: {ended.signal or 'without a result'}"]
    status = result["status"]
    changed = [name for name in result["changed"] if not _may_change(name, case, status)]
    if changed:
        wrong.append(f"changed: {', '.join(changed[:5])}")
    wrong += _said(case, status, stdout, stderr)
    if status == 0:
        if case["expect"] == "refused":
            wrong.append("is not refused")
        if result.get("wrong"):
            wrong.append(result["wrong"])
    elif status != 2:
        wrong.append(f"exit status {status}")
    return f"exit {status}", wrong


def _said(case: dict[str, Any], status: int, stdout: str, stderr: str) -> list[str]:
    wrong = []
    lines = [line for line in stderr.splitlines() if not _SAID.fullmatch(line)]
    if "Traceback (most recent call last)" in stderr:
        wrong.append("traceback")
    told = stdout if case["command"][0] in ("inspect", "verify") else ""  # answers are the model's own
    if case["command"][0] != "load" and _CONTROL.search(stderr + told):
        wrong.append("control characters reach the terminal")
    if status == 2:
        if case["stderr"] == "file" and len(lines) != 1:
            wrong.append(f"{len(lines)} lines on stderr")
        if case["stderr"] == "file" and not re.search(r"popcompile.*error: ", stderr):
            wrong.append("stderr is not popcompile's line")
        if stdout and case["command"][0] != "run" and case["stdout"] == "file":  # run streams an answer as it comes
            wrong.append("stdout is not empty")
    if status == 0:
        if lines:
            wrong.append("noise on stderr")
        if "--json" in case["command"] and case["stdout"] == "file":
            try:
                json.loads(stdout, parse_constant=_no_constant)
            except ValueError as error:
                wrong.append(f"stdout is not JSON: {error}")
    if len(stderr) > LINE:
        wrong.append(f"{len(stderr)} characters on stderr")
    return wrong


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _may_change(name: str, case: dict[str, Any], status: int | None) -> bool:
    """Outputs after success, and what libraries keep in a home folder."""
    if name.split("/")[0] in ("home", "tmp"):
        return True
    outs = [_key(out) for out in case["out"]]
    return status == 0 and any(name == out or name.startswith(out + "/") for out in outs)


def _key(path: str) -> str:
    return path.encode("utf-8", "surrogateescape" if "\ud800" not in path else "replace").decode(
        "ascii", "backslashreplace"
    )


def read(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError):
        return None
