"""A package appears whole or not at all, is replaced in one step, and goes only where it can."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from bad_input import names, refusal

from popcompile.errors import PopcompileError
from popcompile.package import staging
from popcompile.package.manifest import MANIFEST
from popcompile.package.staging import require_disk_space, require_writable, staged


def write(folder: Path, text: str) -> None:
    """What is a package to this module."""
    (folder / "passes").mkdir()
    (folder / "passes" / "00.txt").write_text(text)
    (folder / MANIFEST).write_text(json.dumps({"files": {"passes/00.txt": {}, "stale.txt": {}}, "text": text}))


def text_of(package: Path) -> str:
    return str(json.loads((package / MANIFEST).read_text())["text"])


def test_a_package_appears_at_the_end(tmp_path: Path) -> None:
    with staged(tmp_path / "out") as folder:
        write(folder, "new")
        assert folder.parent == tmp_path and folder.name.startswith(".")
        assert not (tmp_path / "out").exists()
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["passes", MANIFEST]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, PopcompileError])
def test_a_failure_leaves_nothing(error: type[BaseException], tmp_path: Path) -> None:
    def convert() -> None:
        with staged(tmp_path / "out") as folder:
            write(folder, "half")
            raise error

    with pytest.raises(error):
        convert()
    assert names(tmp_path) == []


def test_a_failure_leaves_the_old_package(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "old")

    def convert() -> None:
        with staged(tmp_path / "out", force=True) as folder:
            write(folder, "half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        convert()
    assert names(tmp_path) == ["out"] and text_of(tmp_path / "out") == "old"


@pytest.mark.parametrize("exchange", [True, False], ids=["one step", "a system without renameat2"])
def test_force_replaces_everything(exchange: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "old")
    (tmp_path / "out" / "stale.txt").touch()
    with staged(tmp_path / "out", force=True) as folder:
        write(folder, "new")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["passes", MANIFEST]


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_exchange_is_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    assert staging._exchange(tmp_path / "a", tmp_path / "b")
    assert names(tmp_path / "a") == ["b"] and names(tmp_path / "b") == ["a"]
    assert not staging._exchange(tmp_path / "a", tmp_path / "missing")


def test_a_failed_replacement_puts_the_old_package_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    (tmp_path / "out").mkdir()
    write(tmp_path / "out", "old")
    temporary = tmp_path / "was removed meanwhile"
    with pytest.raises(FileNotFoundError):
        staging._put_in_place(temporary, tmp_path / "out", force=True)
    assert names(tmp_path) == ["out"] and text_of(tmp_path / "out") == "old"


def test_what_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    def convert() -> None:
        with staged(tmp_path / "out") as folder:
            write(folder, "ours")
            (tmp_path / "out").mkdir()
            write(tmp_path / "out", "theirs")

    assert "something appeared there meanwhile; give another folder, or --force" in refusal(convert)
    assert names(tmp_path) == ["out"] and text_of(tmp_path / "out") == "theirs"


def test_what_killed_conversions_left_is_removed(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    dead, alive = process.pid, os.getppid()
    for left in (f".a[1].partial-{dead}", f".a[1].probe-{dead}", f".a[1].replaced-{dead}"):
        (tmp_path / left).mkdir()
    others = [f".a[1].partial-{alive}", f".a.partial-{dead}", f".a1.partial-{dead}", ".a[1].partial-x", "b"]
    for other in others:
        (tmp_path / other).mkdir()
    (tmp_path / "a[1]").mkdir()
    with staged(tmp_path / "a[1]", force=True) as folder:
        write(folder, "new")
    assert names(tmp_path) == sorted([*others, "a[1]"])


def test_a_package_that_was_moved_aside_comes_back(tmp_path: Path) -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    (tmp_path / f".out.replaced-{process.pid}").mkdir()
    write(tmp_path / f".out.replaced-{process.pid}", "old")
    with pytest.raises(RuntimeError), staged(tmp_path / "out", force=True):
        raise RuntimeError
    assert names(tmp_path) == ["out"] and text_of(tmp_path / "out") == "old"


DISK = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "larger than this process or disk allows; raise the limit",
    errno.EROFS: "the disk is read-only; choose another place",
    errno.EACCES: "no permission to write there; choose another place",
    errno.EIO: "the disk fails",
}


@pytest.mark.parametrize("number", DISK)
def test_write_errors_are_named(number: int, tmp_path: Path) -> None:
    def fail(error: Exception) -> Callable[[], None]:
        def convert() -> None:
            with staged(tmp_path / "out") as folder:
                write(folder, "half")
                raise error

        return convert

    assert DISK[number] in refusal(fail(OSError(number, os.strerror(number))))
    assert DISK[number] in refusal(fail(OSError(number, os.strerror(number), str(tmp_path / ".out.partial-1" / "x"))))
    assert names(tmp_path) == []
    elsewhere = OSError(number, os.strerror(number), "/somewhere/model.safetensors")  # reading, perhaps
    if number in (errno.EROFS, errno.EACCES, errno.EIO):
        with pytest.raises(OSError, match="somewhere"):
            fail(elsewhere)()
    else:
        assert DISK[number] in refusal(fail(elsewhere))


def test_a_disk_without_space(tmp_path: Path) -> None:
    require_disk_space(tmp_path / "out", 4096)
    message = refusal(lambda: require_disk_space(tmp_path / "out", 10**18))
    assert "the disk is full, the weights need 1000000000000.0 MB" in message and "free some space" in message


# --- where a package can be put ----------------------------------------------------------------------------------


def test_places_that_are_fine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "old").mkdir()
    write(tmp_path / "old", "old")
    before = names(tmp_path)
    require_writable(Path("new"), force=False)
    require_writable(tmp_path / "with space [1] é", force=False)
    require_writable(Path("empty/../new/"), force=False)
    require_writable(Path("empty"), force=True)
    require_writable(Path("old"), force=True)
    assert names(tmp_path) == before


def test_places_that_are_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "notes.txt").touch()
    (tmp_path / "link").symlink_to(tmp_path / "work")
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes.txt").touch()
    monkeypatch.chdir(tmp_path / "work")
    for place, force, words in [
        ("../work", False, "exists already; give another folder, or --force"),
        (".", True, "is or holds the folder that you are in; run the command from elsewhere"),
        ("..", True, "is or holds the folder that you are in"),
        ("../other", True, "is no package, and --force replaces packages only; give another folder"),
        ("/", True, "is a mount point, which no folder can replace; give a folder in it"),
        ("notes.txt", False, "exists already"),
        ("notes.txt", True, "is no folder, and --force replaces packages only; give another folder"),
        ("../link", True, "is no folder"),
        ("../dangling", False, "exists already"),
        ("notes.txt/out", False, "there is no folder"),
        ("missing/out", False, "create it first"),
        ("x" * 300, False, "(File name too long); choose another place"),
        ("x" * 250, False, "(File name too long); choose another place"),
    ]:
        message = refusal(lambda p=place, f=force: require_writable(Path(p), f))  # type: ignore[misc]
        assert words in message and message.startswith(place), place
    assert names(tmp_path) == ["dangling", "link", "other", "work"] and names(tmp_path / "work") == ["notes.txt"]
