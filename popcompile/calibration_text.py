"""The text that a conversion calibrates on, and the part of it that is held out to measure the loss."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from popcompile.analysis import sample_texts
from popcompile.errors import PopcompileError
from popcompile.execution import Reader
from popcompile.passes import Program
from popcompile.texts import read_texts, windows

#: "--calibration self": text sampled from the model itself
SELF = "self"
#: texts to calibrate on, texts held out, and tokens of each, of which the prompt has four fifths
TEXTS, HELD_OUT, TOKENS = 64, 12, 320
#: the least that calibration makes sense with
_FEWEST, _SHORTEST = 8, 64


@dataclass(frozen=True)
class CalibrationText:
    """calibration [N, T] and held_out [M, T]: token ids. source: what they are, for the report."""

    calibration: Tensor
    held_out: Tensor
    source: str

    @property
    def prompt(self) -> int:
        """Tokens of a held-out text that are its prompt; the others are its continuation."""
        return self.held_out.shape[1] * 4 // 5


def calibration_text(
    origin: str,
    program: Program,
    read: Reader,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    texts: int = TEXTS,
    seed: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> CalibrationText:
    """origin: "self" or a text file (popcompile/texts.py says of what kinds). program: canonical.

    Raises PopcompileError where the file cannot be used or the model's context is too short.
    """
    tokens = min(TOKENS, program.max_positions)
    if tokens < _SHORTEST:
        raise PopcompileError(
            f"the model's context of {tokens} tokens is too short to calibrate on ({_SHORTEST} are needed); give"
            " --kv-projection layer"
        )
    if origin == SELF:
        rows = sample_texts(program, read, tokenizer, texts + HELD_OUT, tokens, seed, progress)
        return CalibrationText(rows[HELD_OUT:], rows[:HELD_OUT], "text sampled from the model itself")
    documents = read_texts(Path(origin))
    if tokenizer is None:
        raise PopcompileError(f"--calibration {origin}: the model has no tokenizer; give --calibration {SELF}")
    found = windows(tokenizer, documents, texts + HELD_OUT, tokens, seed, origin)
    held_out = min(HELD_OUT, len(found) // 4)
    if len(found) < _FEWEST:
        raise PopcompileError(
            f"--calibration {origin}: too short, it has {len(found)} pieces of {tokens} tokens and needs {_FEWEST};"
            f" give more text, or --calibration {SELF}"
        )
    rows = torch.stack(found)
    return CalibrationText(rows[held_out:], rows[:held_out], f"held-out part of {Path(origin).name}")
