"""`popcompile demo`: that it is honest, and soon done."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import psutil
import pytest
from bad_input import popcompile

from popcompile.cli.demonstration import _calibration_text, _document


def test_what_is_asked_about_is_not_calibrated_on() -> None:
    """Nor does a paragraph of the calibration text stand there twice, once held out of it."""
    calibrated = _calibration_text()
    sentences = [part for part in re.split(r"(?<=[.;]) ", _document()) if len(part) > 40]
    assert len(sentences) > 20 and not [part for part in sentences if part in re.sub(r'[*`="]+', "", calibrated)]
    paragraphs = calibrated.split("\n\n")
    assert len(set(paragraphs)) == len(paragraphs) > 200


@pytest.mark.real
def test_demo(tmp_path: Path) -> None:
    """A package with its loss, and a prompt answered twice, in some 90 s of CPU time.

    Threads that wait for busy cores would be counted as well.
    """
    before = psutil.Process().cpu_times()
    done = popcompile("demo", "--out", tmp_path / "out", env=os.environ | {"OMP_WAIT_POLICY": "passive"})
    after = psutil.Process().cpu_times()
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"--- {how} prefill\n\w", done.stdout) for how in ("full", "pop"))
    full, pop = re.search(r"full prefill (\d+) ms, pruned prefill (\d+) ms", done.stdout).groups()  # type: ignore[union-attr]
    assert int(full) > 0 and int(pop) > 0
    quality = json.loads((tmp_path / "out/report.json").read_text())["quality"]
    loss, own = quality["loss"], quality["own_projection"]
    assert loss["first_token_kl"] < 0.05 and loss["retrieval_kl"] < 0.5 * own["retrieval_kl"]
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    assert spent < 150, f"{spent:.0f} s of CPU time"
