"""What a case's own process does: damage a copy, run the command as the shell would, and note what came of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import resource
import stat
import sys
import traceback
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from fuzz.case import Case, Maker, Workspace
from fuzz.packages import QUESTIONS

#: address space beyond what the process has: a guard for the machine, far over what is allowed
GUARD = 12 << 30
LARGEST_FILE = 4 << 30
NOBODY = 65534


def work(maker: Maker, name: str, workspace: Workspace, log: Path, quick: bool) -> None:
    """Run one case; leaves case.json, stdout, stderr and result.json in `log`, or as much of them as it got to.

    quick: pass over the case where its command traces a model; the runner lets one in eight through.
    """
    os.environ |= {"HOME": str(workspace.root / "home"), "TMPDIR": str(workspace.root / "tmp")}
    for folder in ("home", "tmp", "outside"):
        (workspace.root / folder).mkdir()
    (workspace.outside / "secret").write_text("secret")
    case = maker(Random(name), workspace)
    (log / "case.json").write_text(json.dumps(asdict(case)))
    if quick and case.traces:
        (log / "passed_over").touch()
        return
    if case.unprivileged and os.geteuid() == 0:
        _give_away(workspace.root, log)
    os.chdir(workspace.root)
    before = snapshot(workspace.root)
    result: dict[str, Any] = {"status": None}
    limit = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + GUARD
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST_FILE, LARGEST_FILE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _redirect(case, log)
    result["status"] = _run(case.command)
    (log / "ended").touch()  # the clock of the command stops here
    result["peak"] = peak()
    with open(os.devnull, "r+") as null:
        for descriptor in (0, 1, 2):
            os.dup2(null.fileno(), descriptor)
    sys.stdin, sys.stdout, sys.stderr = io.StringIO(), io.StringIO(), io.StringIO()
    after = snapshot(workspace.root)
    result["changed"] = [name for name in sorted(before.keys() | after.keys()) if before.get(name) != after.get(name)]
    if result["status"] == 0 and case.expect != "refused":
        try:
            result["wrong"] = check(case, workspace, log)
        except BaseException as error:
            where = traceback.extract_tb(error.__traceback__)[-1]
            result["wrong"] = (
                f"the check fails: {type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
            )
    (log / "result.json").write_text(json.dumps(result))


def _streams_are_files(case: Case) -> bool:
    return case.stdout == "file" and case.stdin in ("y\n", QUESTIONS)


def _run(command: list[str]) -> int:
    """The exit status, as the interpreter would end with it."""
    try:
        if command[0] == "load":
            return _load(command[1])
        from popcompile.cli import main

        status = main(command)
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 0 if ended.code is None else 1
    except BaseException:
        with contextlib.suppress(OSError, AttributeError):  # stderr may be full, or closed
            traceback.print_exc()
        status = 1
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        return 120
    return status


def _load(folder: str) -> int:
    """popcompile.load and two calls, with PopcompileError as the command line shows it."""
    import torch

    import popcompile
    from popcompile.errors import PopcompileError

    try:
        model = popcompile.load(folder)
        model(torch.tensor([[3, 4, 5]]), prefill="pop", logits_to_keep=1)
        if "decode" in model.manifest.graphs:
            model(torch.tensor([[3, 4, 5]]))
    except PopcompileError as error:
        print(f"popcompile: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def _redirect(case: Case, log: Path) -> None:
    """The three streams, as files or devices, or closed."""
    sys.stdout.flush()
    sys.stderr.flush()
    (log / "stdin").write_text(
        case.stdin, encoding="utf-8", errors="surrogateescape" if "\ud800" not in case.stdin else "replace"
    )
    places = {0: case.stdin, 1: case.stdout, 2: case.stderr}
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        (log / name).touch()
        if places[descriptor] == "closed":
            os.close(descriptor)
            setattr(sys, name, None)
            continue
        device = places[descriptor] if places[descriptor].startswith("/dev/") and descriptor else log / name
        opened = os.open(device, os.O_WRONLY if descriptor else os.O_RDONLY)
        if opened != descriptor:
            os.dup2(opened, descriptor)
            os.close(opened)
        mode, errors = ("w", "backslashreplace" if descriptor == 2 else "strict") if descriptor else ("r", "strict")
        stream = open(  # noqa: SIM115
            descriptor, mode, encoding="utf-8", errors=errors, closefd=False, buffering=1 if descriptor == 2 else -1
        )
        setattr(sys, name, stream)


def _give_away(root: Path, log: Path) -> None:
    """Become a user without privileges, who owns the workspace."""
    for path in (root, log, *root.rglob("*"), *log.rglob("*")):
        os.lchown(path, NOBODY, NOBODY)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def snapshot(root: Path) -> dict[str, Any]:
    """What is below a folder, without reading more than a megabyte of a file, or any device."""
    found: dict[str, Any] = {}
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            about = path.lstat()
            key = os.fsencode(path.relative_to(root)).decode("ascii", "backslashreplace")
            if stat.S_ISDIR(about.st_mode):
                found[key] = "folder"
            elif stat.S_ISREG(about.st_mode):
                small = about.st_size <= 1 << 20 and about.st_mode & 0o400
                found[key] = (about.st_size, about.st_mtime_ns, path.read_bytes() if small else b"")
            else:
                found[key] = (about.st_mode, os.readlink(path) if path.is_symlink() else "")
    return found


def peak() -> int:
    """Peak resident memory, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# --- right output ------------------------------------------------------------------------------------------------


def check(case: Case, workspace: Workspace, log: Path) -> str:
    """What is wrong about a success, or ""."""
    from fuzz.bases import key, package_logits, transformers_logits

    if case.command[0] == "run" and case.expect == "same" and _streams_are_files(case):
        answers = json.loads((workspace.bases / "answers.json").read_text())[case.base]
        said = (log / "stdout").read_text()
        if said != answers.get(key(case.command), said):
            return f"answers {said!r}, not {answers[key(case.command)]!r}"

    if case.command[0] in ("inspect", "evaluate") or (case.command[0] == "run" and case.expect == "any"):
        return ""  # run opens one of the graphs
    logits = None
    if case.package is not None and case.command[0] in ("run", "load", "verify", "convert"):
        logits = package_logits(workspace.root / case.package)
        if not np.isfinite(logits).all():
            return "" if case.command[0] == "load" and case.expect == "any" else "logits are not finite"
    expected = None
    if case.expect in ("same", "logits") and case.base is not None:
        with np.load(workspace.bases / "logits.npz") as answers:
            expected = answers.get(case.base)
    elif case.expect in ("transformers", "peft"):
        options = {"gguf_file": case.gguf} if case.gguf else {}
        adapter = workspace.root / case.adapter if case.adapter else None
        assert case.model is not None
        expected = transformers_logits(workspace.root / case.model, adapter, **options)
    if logits is None or expected is None:
        return ""
    if case.command[0] == "convert":  # the expected logits are transformers' own, of every token
        logits = logits[: len(expected)]
    if logits.shape != expected.shape:
        return f"logits have shape {logits.shape}, not {expected.shape}"
    worst = float(np.abs(logits - expected).max() / max(np.abs(expected).max(), 1e-6))
    return "" if worst <= 1e-4 else f"logits differ by {worst:.1e} of the largest"
