"""What `pip install popcompile` puts on a machine: every module, and commands that start."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ("popcompile", "passes", "export")
COMMANDS = ("convert", "analyze", "run", "serve", "inspect", "verify", "evaluate", "bench", "demo")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    source = out / "source"  # building leaves files beside the project
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", str(out), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_every_module_is_in_it(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "popcompile").rglob("*.py")}
    expected |= {
        f"popcompile/{path.relative_to(ROOT)}" for f in ("passes", "export") for path in (ROOT / f).glob("*.py")
    }
    expected |= {"popcompile/py.typed", "popcompile/report/page.html.jinja"}
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_its_commands_start(wheel: Path, tmp_path: Path) -> None:
    """From the wheel alone, beside the libraries of this environment."""
    zipfile.ZipFile(wheel).extractall(tmp_path)
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    for arguments in (["--version"], *([command, "--help"] for command in COMMANDS)):
        code = "import popcompile, sys; from popcompile.cli import main; print(popcompile.__file__); sys.exit(main())"
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True
        )
        assert (done.returncode, done.stderr) == (0, "") and str(tmp_path) in done.stdout.splitlines()[0]
        assert len(done.stdout.splitlines()) > 1
