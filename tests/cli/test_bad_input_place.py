"""Bad places for a package, and conversions that are killed: one line with cause and fix, no half package."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from bad_input import Cli, assert_one_line, names, snapshot

from popcompile.cli import main
from popcompile.conversion import convert
from popcompile.package.manifest import LAYOUTS, MANIFEST, check_files, read_manifest

WEIGHTS = LAYOUTS["split"].weights

linux = pytest.mark.skipif(sys.platform != "linux", reason="mount namespaces and forkserver are Linux's")


def test_places_that_are_taken(cli: Cli, model: Path, package: Path, tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").touch()
    assert "exists already; give another folder, or --force to replace it" in cli.refuses("convert", model, package)
    assert "exists already" in cli.refuses("convert", model, tmp_path / "work")
    assert "--force replaces packages only" in cli.refuses("convert", model, tmp_path / "work", "--force")
    assert "--force replaces packages only" in cli.refuses("convert", model, model, "--force")
    notes = tmp_path / "work" / "notes.txt"
    assert "exists already" in cli.refuses("convert", model, notes)
    assert "is no folder, and --force replaces" in cli.refuses("convert", model, notes, "--force")
    assert "there is no folder" in cli.refuses("convert", model, tmp_path / "a" / "b")
    assert "create it first" in cli.refuses("convert", model, notes / "out")
    assert "File name too long" in cli.refuses("convert", model, tmp_path / ("x" * 300))


def test_the_folder_that_one_is_in(cli: Cli, model: Path, package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To replace it would leave the shell in a folder that is nowhere."""
    for here, given in {package: (".", "./", package), package / "passes": ("..", "../", package)}.items():
        monkeypatch.chdir(here)
        for name in given:
            assert "exists already" in cli.refuses("convert", model, name)
            line = cli.refuses("convert", model, name, "--force")
            assert "is or holds the folder that you are in; run the command from elsewhere" in line
    for root in ("/", "//"):
        assert "is a mount point" in cli.refuses("convert", model, root, "--force")


@dataclasses.dataclass(frozen=True)
class Surroundings:
    """What a conversion's process meets.

    disk: (folder, mount options) of a fresh tmpfs that only this process sees.
    file_size: RLIMIT_FSIZE in bytes. user: uid to become.
    """

    disk: tuple[Path, str] | None = None
    file_size: int | None = None
    user: int | None = None


def _child(arguments: list[str], surroundings: Surroundings, log: Path) -> None:
    """Runs in a process of its own: the command line, its output and the disk's files into `log`."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(log / name, os.O_CREAT | os.O_WRONLY, 0o644), number)
    if surroundings.disk:
        mount_tmpfs(*surroundings.disk)
    if surroundings.file_size:
        import resource  # not on Windows

        resource.setrlimit(resource.RLIMIT_FSIZE, (surroundings.file_size, surroundings.file_size))
    if surroundings.user is not None:
        os.setuid(surroundings.user)
    status = main(arguments)
    if surroundings.disk:
        (log / "files").write_text("\n".join(snapshot(surroundings.disk[0])))
    sys.exit(status)


def mount_tmpfs(folder: Path, options: str) -> None:
    """Needs root, or a system that lets everyone have a user namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts, new_user, private, read_only = 0x20000, 0x10000000, (1 << 18) | (1 << 14), 1
    user, group, root = os.geteuid(), os.getegid(), os.geteuid() == 0

    def check(status: int) -> None:
        if status:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    check(libc.unshare(new_mounts if root else new_mounts | new_user))
    if not root:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    check(libc.mount(None, b"/", None, private, None))
    flags = read_only if options == "ro" else 0
    check(libc.mount(b"tmpfs", os.fsencode(folder), b"tmpfs", flags, None if flags else options.encode()))


def _probe(folder: Path) -> None:
    mount_tmpfs(folder, "size=64k")


@pytest.fixture(scope="module")
def processes() -> Any:
    """Processes that start with everything imported, as copies of one that did nothing else."""
    if sys.platform != "linux":
        pytest.skip("needs Linux")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["popcompile.conversion", "transformers.models.llama.modeling_llama", "onnxscript", "torch._dynamo"]
    )
    return context


@pytest.fixture
def disk(processes: Any, tmp_path: Path) -> Path:
    """A folder to mount a disk at."""
    probe = processes.Process(target=_probe, args=(tmp_path,))
    probe.start()
    probe.join()
    if probe.exitcode:
        pytest.skip("this system lets this user mount nothing, not even in a user namespace")
    (tmp_path / "disk").mkdir()
    return tmp_path / "disk"


def convert_in(processes: Any, log: Path, surroundings: Surroundings, *arguments: object) -> tuple[str, list[str]]:
    """The line that a refused conversion prints, and what it leaves on the disk."""
    log.mkdir()
    log.chmod(0o777)
    process = processes.Process(target=_child, args=([*map(str, ("convert", *arguments))], surroundings, log))
    process.start()
    process.join()
    line = (log / "stderr").read_text()
    assert_one_line(process.exitcode, (log / "stdout").read_text(), line)
    return line, (log / "files").read_text().split() if (log / "files").exists() else []


@linux
def test_read_only_disk(processes: Any, disk: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    surroundings = Surroundings(disk=(disk, "ro"))
    line, files = convert_in(processes, tmp_path / "log", surroundings, tiny_checkpoint, disk / "out")
    assert "no permission to write in" in line or "Read-only file system" in line
    assert "choose another place" in line and files == []


@linux
def test_mount_point(processes: Any, disk: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """A volume mounted at OUT, as containers have it, cannot be renamed."""
    surroundings = Surroundings(disk=(disk, "size=1m"))
    line, files = convert_in(processes, tmp_path / "log", surroundings, tiny_checkpoint, disk, "--force")
    assert "is a mount point, which no folder can replace; give a folder in it" in line and files == []
    assert {path.name for path in tmp_path.iterdir()} == {"disk", "log"}


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can look into, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@linux
def test_folder_of_another_user(processes: Any, open_folder: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, open_folder / "model")
    with contextlib.ExitStack() as stack:
        surroundings = Surroundings(user=65534)
        if os.geteuid() != 0:
            open_folder.chmod(0o555)
            stack.callback(open_folder.chmod, 0o755)
            surroundings = Surroundings()
        line, _ = convert_in(
            processes,
            open_folder.parent / f"{open_folder.name}-log",
            surroundings,
            open_folder / "model",
            open_folder / "out",
        )
    shutil.rmtree(open_folder.parent / f"{open_folder.name}-log")
    assert f"no permission to write in {open_folder}; choose another place" in line
    assert [path.name for path in open_folder.iterdir()] == ["model"]


def kilobytes(package: Path, *patterns: str) -> int:
    """What files take on a tmpfs."""
    paths = [path for pattern in patterns for path in package.glob(pattern)]
    return sum(-(-path.stat().st_size // 4096) * 4 for path in paths)


#: what fits on the disk, and how much less (KB); what the line says
FULL = {
    "known before any work": ((WEIGHTS,), 64, "the weights need 0.1 MB and"),
    "in the graphs as text": ((WEIGHTS,), -16, "the disk is full; free some space"),
    "in the tokenizer": ((WEIGHTS, "passes/*", "*.onnx", "*on_config.json", "config.json"), 0, "the disk is full"),
}  # fmt: skip


@linux
@pytest.mark.parametrize("moment", FULL)
def test_disk_full(
    moment: str, processes: Any, disk: Path, tiny_checkpoint: Path, tiny_package: Path, tmp_path: Path
) -> None:
    patterns, less, words = FULL[moment]
    surroundings = Surroundings(disk=(disk, f"size={kilobytes(tiny_package, *patterns) - less}k"))
    line, files = convert_in(processes, tmp_path / "log", surroundings, tiny_checkpoint, disk / "out", "--prune", "1")
    assert words in line and "free some space" in line
    assert files == []


@linux
def test_file_size_limit(processes: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    surroundings = Surroundings(file_size=100_000)  # the weights are larger
    line, _ = convert_in(processes, tmp_path / "log", surroundings, tiny_checkpoint, tmp_path / "disk" / "out")
    assert "a file gets larger than this process or disk allows; raise the limit (ulimit -f)" in line
    assert list((tmp_path / "disk").iterdir()) == []


# --- conversions that are killed -------------------------------------------------------------------------------

Moment = Callable[[Path, Path], bool]


def _replaced(out: Path) -> Moment:
    before = out.stat().st_ino
    return lambda _, out: out.exists() and out.stat().st_ino != before


#: moment(hidden folder, OUT)
MOMENTS: dict[str, Moment] = {
    "the hidden folder appears": lambda hidden, _: hidden.exists(),
    "passes are written": lambda hidden, _: (hidden / "passes").exists() and len(os.listdir(hidden / "passes")) > 5,
    "weights are written": lambda hidden, _: (hidden / WEIGHTS).exists(),
    "the manifest is written": lambda hidden, _: (hidden / MANIFEST).exists(),
}


def killed(processes: Any, log: Path, moment: Moment, *arguments: object) -> str:
    """Convert, and kill it when `moment` has come; the name of its hidden folder."""
    log.mkdir(exist_ok=True)
    out = Path(str(arguments[1]))
    process = processes.Process(target=_child, args=([*map(str, ("convert", *arguments))], Surroundings(), log))
    process.start()
    hidden = out.with_name(f".{out.name}.partial-{process.pid}")
    deadline = time.monotonic() + 60
    while not moment(hidden, out):
        assert process.is_alive() and time.monotonic() < deadline, (log / "stderr").read_text()
        time.sleep(0.0005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return hidden.name


@linux
def test_killed_conversions(processes: Any, tiny_checkpoint: Path, tiny_package: Path, tmp_path: Path) -> None:
    """One after another, so that each also removes what the one before it left."""
    parent, log = tmp_path / "parent", tmp_path / "log"
    parent.mkdir()
    out = parent / "out"
    hidden = killed(
        processes, log, lambda hidden, _: (hidden / "decode.onnx").exists(), tiny_checkpoint, out, "--prune", "1"
    )
    assert names(parent) == [hidden], "no half package under OUT's name"
    shutil.copytree(tiny_package, out)
    before = snapshot(out)
    for name, moment in MOMENTS.items():
        hidden = killed(processes, log, moment, tiny_checkpoint, out, "--force", "--prune", "0")
        assert names(parent) == [hidden, "out"], name
        assert snapshot(out) == before, name
        check_files(out, read_manifest(out), full=True)
    replaced = killed(processes, log, _replaced(out), tiny_checkpoint, out, "--force", "--prune", "0")
    assert set(names(parent)) <= {"out", replaced}  # the rename was done: the new package, whole
    check_files(out, read_manifest(out), full=True)
    assert read_manifest(out).pruned == []


def test_interrupted_conversion(model: Path, tmp_path: Path) -> None:
    """Ctrl-C, in the middle."""

    def interrupt(step: str, done: int, total: int) -> None:
        if step == "compile" and done > 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "out", prune=1, progress=interrupt)
    assert names(tmp_path) == ["model"]
