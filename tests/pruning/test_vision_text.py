"""A vision-language model on text alone is its text decoder: calibrated, chosen and measured as that one is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import vision_reference as reference
from vision_checkpoint import PROCESSOR

import popcompile
from popcompile.pruning.analyze import analyze
from popcompile.pruning.rows import TOKEN_IDS, ImageTokens, Rows


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Without a tokenizer, so that no questions can be asked about images."""
    folder = tmp_path_factory.mktemp("models") / "vision"
    config = reference.qwen3_vl(max_position_embeddings=96, num_hidden_layers=4)
    reference.random_model(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def test_a_conversion_measures_what_that_of_the_decoder_does(checkpoint: Path, tmp_path: Path) -> None:
    few: dict[str, Any] = {"max_kl": 0.5, "calibration_texts": 16, "refinement_steps": 4, "seed": 3}
    reports = []
    for name, text_only in (("whole", False), ("text", True)):
        manifest = popcompile.convert(checkpoint, tmp_path / name, text_only=text_only, **few)
        assert ("vision" in manifest.graphs) != text_only and manifest.kv_projection == "calibrated"
        reports.append(json.loads((tmp_path / name / "report.json").read_bytes()))
    whole, text = reports
    assert whole["choice"] == text["choice"] and whole["quality"] == text["quality"]
    assert len(whole["choice"]["frontier"]) > 2 and whole["quality"]["loss"]["first_token_kl"] > 0


def test_importance_is_that_of_the_decoder(checkpoint: Path) -> None:
    whole, text = (analyze(checkpoint, texts=2, tokens=12, text_only=only) for only in (False, True))
    assert whole.importance == text.importance and min(whole.importance.decode) > 0


def test_ids_are_given_as_they_are() -> None:
    """And rows, of text and of images, can be chosen."""
    ids = torch.arange(12).view(3, 4)
    slots = torch.tensor([[3, 1], [0, 0], [2, 3]])
    (given,) = TOKEN_IDS.of(Rows(ids), slots)
    assert torch.equal(given, torch.tensor([[3, 1], [4, 4], [10, 11]]))
    images = ImageTokens(torch.zeros(1, 8), torch.full((3, 4), -1), torch.arange(36).view(3, 3, 4))
    for chosen in (slice(1, 3), torch.tensor([1, 2])):
        part = replace(Rows(ids), images=images)[chosen]
        assert torch.equal(part.ids, ids[1:]) and len(part) == 2 and part.length == 4
        assert part.images is not None and part.images.features is images.features
        assert torch.equal(part.images.position_ids, images.position_ids[:, 1:])
        assert torch.equal(part.images.index, images.index[1:])
