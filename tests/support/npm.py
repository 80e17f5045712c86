"""Packages of npm that tests run, installed once into the cache folder that tests share."""

from __future__ import annotations

import subprocess
from pathlib import Path

from bad_input import TIMEOUT
from filelock import FileLock

from popcompile.frontend.samples import cache_folder


def npm_packages(name: str, *packages: str) -> Path:
    """A folder of this name, with each package, "name@version", in its node_modules. No script of theirs has run."""
    folder = cache_folder() / name
    folder.mkdir(exist_ok=True)
    with FileLock(folder / "lock"):
        if not all((folder / "node_modules" / package.rpartition("@")[0]).is_dir() for package in packages):
            options = ["--no-save", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder)]
            subprocess.run(["npm", "install", *options, *packages], check=True, capture_output=True, timeout=TIMEOUT)
    return folder
