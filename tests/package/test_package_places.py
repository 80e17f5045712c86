"""A package is its folder and nothing else: it works where it is moved to, read only, and in several processes."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bad_input import Cli, snapshot

PROMPT = ["--prompt", "the cat sat", "--max-new-tokens", "5"]


def answer(cli: Cli, package: Path) -> str:
    """What `run` prints of a package, without times."""
    status, out, err = cli.run("run", package, *PROMPT)
    assert status == 0, err
    return out


@pytest.fixture
def moved(tiny_package: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_package, tmp_path / "a" / "package")


def test_moved_and_renamed(cli: Cli, tiny_package: Path, moved: Path, tmp_path: Path) -> None:
    expected = answer(cli, tiny_package)
    (tmp_path / "élsewhere").mkdir()
    place = moved.rename(tmp_path / "élsewhere" / "a name with spaces")
    assert answer(cli, place) == expected
    assert cli.run("verify", place)[0] == 0
    link = tmp_path / "link"
    link.symlink_to(place, target_is_directory=True)
    assert answer(cli, link) == expected
    assert "no such package folder" in cli.refuses("run", moved, *PROMPT)


def test_read_only(cli: Cli, moved: Path) -> None:
    """Nothing is written into a package, by any command that reads one."""
    for path in (*moved.rglob("*"), moved):
        path.chmod(0o555 if path.is_dir() else 0o444)
    try:
        before = snapshot(moved)
        times = {path: path.stat().st_mtime_ns for path in (moved, *moved.rglob("*"))}
        answer(cli, moved)
        for command in (["inspect", moved], ["verify", moved], ["bench", moved, "--lengths", "8", "--repeats", "1"]):
            status, _, err = cli.run(*command)
            assert status == 0, err
        assert snapshot(moved) == before
        assert {path: path.stat().st_mtime_ns for path in times} == times
    finally:
        for path in (moved, *moved.rglob("*")):
            path.chmod(0o755)


def test_two_processes_at_once(cli: Cli, tiny_package: Path) -> None:
    expected = answer(cli, tiny_package)
    command = [sys.executable, "-m", "popcompile", "run", str(tiny_package), *PROMPT]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert (process.returncode, out) == (0, expected), err


def test_replaced_while_it_is_open(tiny_package: Path, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """`convert --force` puts another package in its place; a process that has loaded the old one goes on with it."""
    import torch

    import popcompile

    out = shutil.copytree(tiny_package, tmp_path / "out")
    ids = torch.tensor([[5, 6, 7, 8]])
    model = popcompile.load(out)
    before = model.generate(ids, max_new_tokens=4)
    popcompile.convert(tiny_checkpoint, out, layers="0", kv_projection="layer", force=True)
    assert torch.equal(model.generate(ids, max_new_tokens=4), before)
    assert popcompile.load(out).manifest.pruned == [0]
