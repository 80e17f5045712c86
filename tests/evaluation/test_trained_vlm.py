"""Tiny vision-language models that read numbers in pictures: what pruning costs one that has learned something."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from tiny_vlm.conversations import picture
from tiny_vlm.inputs import Inputs
from trained_vlm import Trained
from transformers import AutoModelForImageTextToText

import popcompile
from popcompile.evaluation.pictures import evaluate_pictures

pytestmark = pytest.mark.slow
pytest_plugins = ("trained_vlm",)
#: half of the six layers
PRUNED = "3-5"
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
    assert result["answers"]["answered"]["reference"]["value"] > 0.7
    lines = [json.loads(line) for line in trained.questions.read_text().splitlines()]
    for line, other in zip(lines, [*lines[1:], lines[0]], strict=True):
        line["image"] = other["image"]
    exchanged = tmp_path / "exchanged.jsonl"
    exchanged.write_text("".join(json.dumps(line) + "\n" for line in lines))
    answered = evaluated(trained, package, exchanged)["answers"]["answered"]
    assert (
        answered["reference"]["value"] < 0.3 and answered["pop"]["value"] < 0.3
    )  # one digit of ten is right by chance


def test_half_of_the_layers_skipped_and_the_same_answers(result: dict[str, Any]) -> None:
    assert first_kl(result) < 0.05
    assert result["answers"]["kept"]["value"] > 0.93


def test_dropping_the_layers_is_no_answer(result: dict[str, Any]) -> None:
    answered = result["answers"]["answered"]
    assert answered["dropped"]["value"] < 0.2 < answered["pop"]["value"]


def test_a_window_and_calibration_are_worth_what_they_cost(
    trained: Trained, result: dict[str, Any], tmp_path: Path
) -> None:
    popcompile.convert(trained.model, tmp_path / "paper", layers=PRUNED, window=1, kv_projection="layer")
    popcompile.convert(
        trained.model, tmp_path / "calibrated", layers=PRUNED, window=1, prompt_tokens=256,
        calibration_images=trained.made / "pictures",
    )  # fmt: skip
    paper, calibrated = (first_kl(evaluated(trained, tmp_path / name)) for name in ("paper", "calibrated"))
    assert first_kl(result) < calibrated / 2 and calibrated < paper / 2


@torch.no_grad()
def test_image_tokens_that_see_no_later_ones_read_less(trained: Trained) -> None:
    """What a causal mask costs Gemma 3; Qwen3-VL's images have one."""
    if trained.family.kinds != "token_type_ids":
        pytest.skip("its images are causal")
    model = AutoModelForImageTextToText.from_pretrained(trained.model).eval()
    inputs, random = Inputs(trained.family, trained.model), Random("causal")
    size = trained.family.sizes[0]
    asked = [picture(random, size) for _ in range(QUESTIONS)]
    given = inputs.prompts(asked)
    labels = torch.tensor([inputs.tokenizer(one.turns[0][1])["input_ids"][0] for one in asked])
    rows = torch.arange(len(asked))

    def share() -> float:
        logits = model(**given).logits[rows, given["attention_mask"].sum(1) - 1]
        return (logits.argmax(-1) == labels).float().mean().item()

    whole = share()
    given[trained.family.kinds] = torch.zeros_like(given[trained.family.kinds])
    assert share() < whole - 0.1
