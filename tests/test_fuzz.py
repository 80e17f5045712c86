"""Damaged input of every kind: exit 0 with right output, or exit 2 with one line (tests/fuzz/README.md)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork") or sys.platform != "linux", reason="cases are forked processes")


def fuzz(*arguments: object) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "fuzz", *map(str, arguments)], cwd=Path(__file__).parent, capture_output=True, text=True
    )
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr


def test_200_cases(tiny_package: Path) -> None:
    fuzz("--seed", 0, "--count", 200, "--package", tiny_package, "--packages", "split", "--quick")


@pytest.mark.sweep
def test_5000_cases() -> None:
    fuzz("--seed", 0, "--count", 5000)
