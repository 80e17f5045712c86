"""Models and texts in words of the tiny tokenizer."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

from bad_input import save_model
from conftest import tiny_model
from transformers import PreTrainedModel


def save_words(path: Path, seed: int, count: int = 400) -> Path:
    """Text of the tiny tokenizer's words."""
    draw = random.Random(seed)
    path.write_text(" ".join(f"w{draw.randrange(122)}" for _ in range(count)), encoding="utf-8")
    return path


def save_tiny(folder: Path, config: Any) -> PreTrainedModel:
    """A model whose layers matter, with a tokenizer of words."""
    save_model(folder)
    model = tiny_model(config)
    model.save_pretrained(folder)
    return model
