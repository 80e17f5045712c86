"""Tiny vision-language models that read numbers in pictures: what pruning costs one that has learned something."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

import popcompile
from popcompile.evaluation.pictures import evaluate_pictures

if TYPE_CHECKING:
    from trained_vlm import Trained

pytestmark = pytest.mark.slow
pytest_plugins = ("trained_vlm",)
#: of six layers
PRUNED = "2-5"
QUESTIONS = 200


def evaluated(
    trained: Trained, package: Path, questions: Path | None = None, baselines: bool = False
) -> dict[str, Any]:
    asked = questions or trained.questions
    return evaluate_pictures(package, trained.questions.parent, asked, prompts=QUESTIONS, baselines=baselines)


def first_kl(result: dict[str, Any]) -> float:
    (metrics,) = result["texts"].values()
    return float(metrics["first_token_kl_mean"]["value"])


@pytest.fixture(scope="module")
def package(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As a user compiles it: calibrated on pictures of the kind that it is asked about, with a window."""
    folder = tmp_path_factory.mktemp("packages") / "calibrated"
    pictures = trained.made / "pictures"
    popcompile.convert(trained.model, folder, layers=PRUNED, window=8, calibration_images=pictures, prompt_tokens=256)
    return folder


@pytest.fixture(scope="module")
def result(trained: Trained, package: Path) -> dict[str, Any]:
    return evaluated(trained, package, baselines=True)


def test_the_whole_model_reads(trained: Trained, package: Path, result: dict[str, Any], tmp_path: Path) -> None:
    assert result["answers"]["answered"]["reference"]["value"] > 0.65
    lines = [json.loads(line) for line in trained.questions.read_text().splitlines()]
    for line, other in zip(lines, [*lines[1:], lines[0]], strict=True):
        line["image"] = other["image"]
    exchanged = tmp_path / "exchanged.jsonl"
    exchanged.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answered = evaluated(trained, package, exchanged)["answers"]["answered"]
    assert (
        answered["reference"]["value"] < 0.3 and answered["pop"]["value"] < 0.3
    )  # one digit of ten is right by chance


def test_four_of_six_layers_skipped_and_the_same_answers(result: dict[str, Any]) -> None:
    assert first_kl(result) < 0.02
    assert result["answers"]["kept"]["value"] > 0.9


def test_decoding_needs_the_layers(result: dict[str, Any]) -> None:
    """They are skipped in prefill alone: left out of decoding, too, they are missed."""
    answered = result["answers"]["answered"]
    assert answered["dropped"]["value"] < answered["pop"]["value"] - 0.3


def test_what_a_window_gains(trained: Trained, tmp_path: Path) -> None:
    """At the layers' own projections, of which the paper's has a window of 1."""
    losses = {}
    for window in (1, 8):
        package = tmp_path / str(window)
        popcompile.convert(trained.model, package, layers="3-5", window=window, kv_projection="layer")
        losses[window] = first_kl(evaluated(trained, package))
    assert losses[8] < losses[1] / 2
