"""Where a peer is installed: a folder with a virtual environment, and what comes from npm or as source beside it."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from dataclasses import asdict, dataclass
from pathlib import Path

_NODE_PLATFORMS = {"Linux-x86_64": "linux-x64", "Linux-aarch64": "linux-arm64", "Darwin-arm64": "mac-arm64-metal"}


class PeerError(Exception):
    """A peer cannot be installed or built: one line, its tool's last."""


@dataclass(frozen=True)
class Environment:
    """pip: requirements; without: what they bring and is taken out again. npm: packages, `name@version`, {platform} in
    them being this machine's. source: a requirement of which pip brings the source alone.
    """

    pip: tuple[str, ...]
    without: tuple[str, ...] = ()
    npm: tuple[str, ...] = ()
    source: str = ""


@dataclass(frozen=True)
class Installed:
    """An environment on disk."""

    folder: Path

    @property
    def python(self) -> str:
        return str(self.folder / "python" / ("Scripts/python.exe" if os.name == "nt" else "bin/python"))

    @property
    def node_modules(self) -> Path:
        return self.folder / "npm" / "node_modules"

    @property
    def source(self) -> Path:
        """The folder that the source's archive has."""
        return next(path for path in (self.folder / "source").iterdir() if path.is_dir())


def install(folder: Path, environment: Environment) -> Installed:
    """Install into `folder`, unless it is there. Raises PeerError."""
    installed, wanted = Installed(folder), json.dumps(asdict(environment), indent=2)
    record = folder / "environment.json"
    if record.is_file() and record.read_text() == wanted:
        return installed
    print(f"installing {' '.join((*environment.pip, *environment.npm))} into {folder}", file=sys.stderr)
    shutil.rmtree(folder, ignore_errors=True)
    run([sys.executable, "-m", "venv", str(folder / "python")])
    pip = [installed.python, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run([*pip, "install", *environment.pip])
    if environment.without:
        run([*pip, "uninstall", "--yes", *environment.without])
    if environment.source:
        _unpack(pip, environment.source, folder / "source")
    if environment.npm:
        _install_npm(environment.npm, installed.node_modules.parent)
    record.write_text(wanted)
    return installed


def _unpack(pip: list[str], requirement: str, folder: Path) -> None:
    folder.mkdir()
    run([*pip, "download", "--no-deps", "--no-binary", ":all:", "--dest", str(folder), requirement])
    for archive in folder.glob("*.tar.gz"):
        with tarfile.open(archive) as opened:
            opened.extractall(folder, filter="data")
        archive.unlink()


def _install_npm(packages: tuple[str, ...], folder: Path) -> None:
    """No script of theirs runs, and what they leave open, as builds for GPUs, is not installed."""
    npm = shutil.which("npm")
    machine = _NODE_PLATFORMS.get(f"{platform.system()}-{platform.machine()}")
    if npm is None or machine is None:
        raise PeerError("it needs Node.js with npm, on Linux or on a Mac with Apple's processor")
    folder.mkdir()
    options = ["--omit=optional", "--ignore-scripts", "--no-save", "--no-audit", "--no-fund", "--prefix", str(folder)]
    run([npm, "install", *options, *(package.format(platform=machine) for package in packages)])


def run(command: list[str], folder: Path | None = None) -> None:
    """In `folder`, without the hub. Raises PeerError with the last line of what it says, where it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise PeerError((done.stderr.strip().splitlines() or ["it says nothing"])[-1])
