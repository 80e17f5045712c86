"""What reaches the terminal: closed and full streams, characters of others, signals, and surroundings that fail."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from bad_input import TIMEOUT, Cli, assert_one_line, names, popcompile

from popcompile.cli import main
from popcompile.cli.failures import what_to_fix
from popcompile.package.manifest import MANIFEST, read_manifest
from popcompile.terminal import printable, without_controls

posix = pytest.mark.skipif(sys.platform == "win32", reason="POSIX shell")
linux = pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is Linux's")
COMMAND = f"{sys.executable} -m popcompile"


def shell(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", "-c", f"set -o pipefail; {script}"], capture_output=True, text=True, timeout=TIMEOUT,
        env=os.environ | environment,
    )  # fmt: skip


# --- streams ---------------------------------------------------------------------------------------------------


@posix
@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        ("run OUT --chat <&-", 0, ""),
        ("run OUT --chat 0>/dev/null", 2, "stdin cannot be read"),
        ("inspect OUT >&- 2>&- <&-", 0, ""),
        ("convert --nonsense 2>&-", 2, ""),
        ("convert --help 1</dev/null", 2, "the output cannot be written (Bad file descriptor)"),
        pytest.param("convert --nonsense 2>/dev/full", 2, "", marks=linux),
        pytest.param("verify OUT >/dev/full", 2, "the disk is full that the output goes to", marks=linux),
        pytest.param("convert --help >/dev/full", 2, "the disk is full that the output goes to", marks=linux),
        pytest.param("convert --help >/dev/full 2>&1", 2, "", marks=linux),
    ],
)
def test_streams_that_are_closed_or_full(arguments: str, status: int, words: str, tiny_package: Path) -> None:
    done = shell(f"{COMMAND} {arguments.replace('OUT', str(tiny_package))}")
    assert done.returncode == status, done.stderr
    assert words in done.stderr and done.stderr.count("\n") == (1 if words else 0)


@posix
def test_files_do_not_get_the_number_of_a_closed_stream(tiny_package: Path, tmp_path: Path) -> None:
    """What libraries print on stdout or stderr would go into them."""
    code = (
        "import os, popcompile.terminal as t; t.open_streams(); f = open('opened', 'w');"
        "assert f.fileno() > 2; os.write(1, b'x'); os.write(2, b'x'); assert os.read(0, 1) == b''"
    )
    done = subprocess.run(["bash", "-c", f'{sys.executable} -c "{code}" <&- >&- 2>&-'], cwd=tmp_path, timeout=TIMEOUT)
    assert done.returncode == 0 and (tmp_path / "opened").read_bytes() == b""


@posix
@pytest.mark.parametrize(
    ("environment", "arguments", "words"),
    [
        (
            {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0", "TERM": "dumb", "TMPDIR": "/proc/nowhere"},
            "verify OUT",
            "ok  numbers",
        ),
        (
            {"PYTHONIOENCODING": "ascii", "HOME": "/proc/nowhere", "HF_HOME": "/proc/nowhere", "NO_COLOR": "1"},
            "inspect OUT --html x.html",
            "x.html",
        ),
    ],
)
def test_poor_surroundings(
    environment: dict[str, str], arguments: str, words: str, tiny_package: Path, tmp_path: Path
) -> None:
    """The same report, and nothing on stderr: no warnings of libraries, no colours."""
    done = shell(f"cd {tmp_path} && {COMMAND} {arguments.replace('OUT', str(tiny_package))}", **environment)
    assert (done.returncode, done.stderr) == (0, "") and words in done.stdout and "\x1b" not in done.stdout


@posix
def test_a_current_folder_that_was_removed(tiny_package: Path, tmp_path: Path) -> None:
    (tmp_path / "gone").mkdir()
    done = shell(f"cd {tmp_path}/gone && rmdir {tmp_path}/gone && {COMMAND} inspect {tiny_package}")
    assert_one_line(done.returncode, done.stdout, done.stderr)
    assert "the current folder cannot be found" in done.stderr


def test_a_cache_that_is_a_file(tmp_path: Path, cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("POPCOMPILE_CACHE", str(tmp_path / "file"))
    status, _, line = cli.run("demo", "--out", tmp_path / "out")
    assert_one_line(status, "", line)
    assert "set POPCOMPILE_CACHE to a writable folder" in line and names(tmp_path) == ["file"]


# --- characters ------------------------------------------------------------------------------------------------


def test_printable() -> None:
    text = "Grüße 模型 ✓ a\u00a0b"
    assert printable(text) == text
    assert printable("\x1b[31m\x9b\x07\u202e\u2066\u200b\udcff\u2028\n") == (
        r"\x1b[31m\x9b\x07\u202e\u2066\u200b\udcff\u2028\n"
    )
    assert printable("a\tb\n\r", keep="\n\t") == "a\tb\n\\r"
    assert without_controls("שלום \u200f!\n\t\x1b]0;title\x07") == "שלום \u200f!\n\t\\x1b]0;title\\x07"


@pytest.mark.parametrize("name", ["a\x1b[31mred", "a\u202etxt", "a\x07", "a\udcff", "a\rb"])
def test_names_reach_the_terminal_escaped(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["inspect", name], ["convert", "x", "y", "--dtype", name], ["verify", "x", "--provider", name]):
        assert main(arguments) == 2
        err = capsys.readouterr().err
        assert err.isprintable() or err.replace("\n", "").isprintable(), repr(err)
    assert main(["run", name, "--nonsense", name]) == 2
    assert capsys.readouterr().err.replace("\n", "").isprintable()


def test_reports_are_escaped(package: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = read_manifest(package)
    named = replace(manifest, source=manifest.source | {"name": "\x1b[2Jmodel\u202e"})
    (package / MANIFEST).write_text(named.to_json())
    assert main(["inspect", str(package)]) == 0
    out = capsys.readouterr().out
    assert "\\x1b[2Jmodel\\u202e (llama" in out and out.replace("\n", "").isprintable()


def test_internal_errors_are_escaped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*_: object, **__: object) -> None:
        raise LookupError("of \x1b[2J\nours")

    monkeypatch.setattr("popcompile.runtime.verify.verify", fail)
    assert main(["verify", "x"]) == 1
    assert "internal error: LookupError: of \\x1b[2J ours; a bug" in capsys.readouterr().err


# --- failures --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (MemoryError(), "the memory does not suffice; free some"),
        (MemoryError("Unable to allocate 7.45 GiB for an array"), "Unable to allocate 7.45 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you asked for 99 bytes"), "for 99 bytes"),
        (RecursionError("maximum recursion depth exceeded"), "nested too deeply"),
        (OSError(errno.EACCES, "Permission denied", "a/b"), "a/b: Permission denied; give this user the permission"),
        (OSError(errno.EMFILE, "Too many open files", b"x"), "x: Too many open files; raise the limit"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), "give a shorter name"),
        (OSError(errno.ELOOP, "Too many levels of symbolic links", "x"), "lead in a circle"),
        (OSError(errno.EIO, "Input/output error", "x"), "x: Input/output error; the disk or the terminal fails"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), "x: No space left on device; free some space"),
        (OSError(errno.EIO, "Input/output error"), "the output cannot be written (Input/output error)"),
        (FileNotFoundError(errno.ENOENT, "No such file or directory", "out/x.onnx"), "out/x.onnx: No such file"),
        (FileNotFoundError(errno.ENOENT, "No usable temporary directory found in ['/tmp']"), "set TMPDIR"),
        (ModuleNotFoundError("No module named 'lm_eval.x'", name="lm_eval.x"), "pip install --force-reinstall lm-eval"),
        (ImportError("libcudart.so.12: cannot open shared object file"), "install popcompile's dependencies again"),
        (OSError("libtorch_cpu.so: cannot open shared object file"), "a library is broken"),
    ],
)  # fmt: skip
def test_what_the_user_can_fix(error: Exception, words: str) -> None:
    assert words in str(what_to_fix(error, ["out"]))


def test_what_the_user_cannot_fix() -> None:
    ours = [
        FileNotFoundError(errno.ENOENT, "No such file or directory", "/elsewhere/x"),
        ModuleNotFoundError("No module named 'popcompile.x'", name="popcompile.x"),
        ValueError("x"), RuntimeError("shape mismatch"), OSError("strange"), AssertionError(),
    ]  # fmt: skip
    assert [what_to_fix(error, ["out"]) for error in ours] == [None] * len(ours)


def test_a_broken_dependency(tiny_package: Path, tmp_path: Path) -> None:
    """Whatever is wrong with it: here it is an empty file."""
    (tmp_path / "tabulate.py").touch()
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = popcompile("inspect", tiny_package, env=environment)
    assert_one_line(done.returncode, done.stdout, done.stderr)
    assert "tabulate cannot be imported" in done.stderr and "pip install --force-reinstall tabulate" in done.stderr


@linux
def test_too_little_memory_for_the_libraries(tiny_package: Path) -> None:
    done = shell(f"ulimit -v 400000; {COMMAND} verify {tiny_package}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr


# --- signals ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def running(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """popcompile in a process of its own, which ends with the block."""
    command = [sys.executable, "-m", "popcompile", *map(str, arguments)]
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(command, text=True, **pipes) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


@contextlib.contextmanager
def default_action(number: signal.Signals) -> Iterator[None]:
    """What is started in the block ends by the signal, even where `nohup` or CI ignores it for its children."""
    previous = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(number, previous)


def wait(process: subprocess.Popen[str], what: Callable[[], Any]) -> Any:
    """What comes of `what`, once it is something."""
    deadline = time.monotonic() + TIMEOUT
    while not (found := what()):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    return found


def alive(process: psutil.Process) -> bool:
    """Whether it runs; one that ended may still wait for its parent to notice, and `init` is its parent then."""
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@posix
def test_a_conversion_that_is_asked_to_end(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """SIGTERM, as init systems and containers send it, in the middle: nothing is left beside OUT."""
    with running("convert", tiny_checkpoint, tmp_path / "out", "--prune", "1") as process:
        wait(process, (tmp_path / f".out.partial-{process.pid}" / "passes").exists)
        process.terminate()
        assert process.communicate(timeout=TIMEOUT) == ("", "") and process.returncode == 143
    assert names(tmp_path) == []


@posix
def test_a_benchmark_that_is_asked_to_end(tiny_package: Path) -> None:
    """Its workers end too; one that the signal caught being started ends by itself, when nobody can ask it any more."""
    few = ("--lengths", 8, "--repeats", 9999, "--decode-tokens", 2)
    with running("bench", tiny_package, *few) as process:
        parent = psutil.Process(process.pid)
        workers = wait(process, parent.children)
        process.terminate()
        assert process.communicate(timeout=TIMEOUT) == ("", "") and process.returncode == 143
    deadline = time.monotonic() + TIMEOUT
    while any(map(alive, workers)):
        assert time.monotonic() < deadline
        time.sleep(0.01)


@posix
def test_a_chat_whose_terminal_is_closed(tiny_package: Path) -> None:
    """SIGHUP, while it waits for a message; until it ends, because Python sees one just before a read only after it. A
    second one would kill it while it ends, which takes a while on a busy machine.
    """
    with default_action(signal.SIGHUP), running("run", tiny_package, "--chat") as process:
        assert process.stdin is not None and process.stderr is not None
        process.stdin.write("the " * 99 + "\n")
        process.stdin.flush()
        assert "more than the model's context" in process.stderr.readline()  # it is there, and waits for the next
        deadline = time.monotonic() + TIMEOUT
        while process.poll() is None and time.monotonic() < deadline:
            process.send_signal(signal.SIGHUP)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TIMEOUT / 6)
        assert process.returncode == 129 and process.stderr.read() == ""


@posix
def test_handlers_stay_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """The command line, called from Python, sets them for its own time, and not over others."""
    seen = []
    monkeypatch.setattr("popcompile.runtime.verify.verify", lambda *_, **__: seen.append(handlers()) or [])

    def handlers() -> list[object]:
        return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]

    previous = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        before = handlers()
        assert main(["verify", "x"]) == 0
        assert handlers() == before
    finally:
        signal.signal(signal.SIGHUP, previous)
    (inside,) = seen
    assert inside[0] is not signal.SIG_DFL and inside[1] is signal.SIG_IGN
