"""The text that a conversion calibrates on, the part of it that decides, and the part that measures what came out."""

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
#: texts to calibrate on, texts to choose by, as many to measure the result on, and tokens of each
TEXTS, HELD_OUT, TOKENS = 104, 12, 320
#: the least that calibration makes sense with
FEWEST, _SHORTEST = 8, 64
#: of a text, at least
_WINDOWS = 4


@dataclass(frozen=True)
class CalibrationText:
    """calibration [N, T], held_out and unseen [M, T]: token ids. source: what they are, for the report.

    Maps are fitted to `calibration`, `held_out` decides between them, and `unseen` has a part in neither.
    """

    calibration: Tensor
    held_out: Tensor
    unseen: Tensor
    source: str

    @property
    def prompt(self) -> int:
        """Tokens of a held-out text that are its prompt, four fifths; the others are its continuation."""
        return self.held_out.shape[1] * 4 // 5


def calibration_text(
    origin: str,
    program: Program,
    read: Reader,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    texts: int = TEXTS,
    window: int = 1,
    seed: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> CalibrationText:
    """origin: "self" or a text file (popcompile/texts.py says of what kinds). program: canonical. window: tokens at a
    prompt's end that take the whole model; texts are long enough for prompts of several windows.

    Raises PopcompileError where the file cannot be used or the model's context is too short.
    """
    tokens = min(max(TOKENS, _WINDOWS * window), program.max_positions)
    if tokens < _SHORTEST:
        raise PopcompileError(
            f"the model's context of {tokens} tokens is too short to calibrate on ({_SHORTEST} are needed); give"
            " --kv-projection layer"
        )
    if origin == SELF:
        rows = sample_texts(program, read, tokenizer, texts + 2 * HELD_OUT, tokens, seed, progress)
        return _divided(rows, HELD_OUT, "text sampled from the model itself")
    documents = read_texts(Path(origin))
    if tokenizer is None:
        raise PopcompileError(f"--calibration {origin}: the model has no tokenizer; give --calibration {SELF}")
    found = windows(tokenizer, documents, texts + 2 * HELD_OUT, tokens, seed, origin)
    if len(found) < FEWEST:
        raise PopcompileError(
            f"--calibration {origin}: too short, it has {len(found)} pieces of {tokens} tokens and needs {FEWEST};"
            f" give more text, or --calibration {SELF}"
        )
    return _divided(torch.stack(found), min(HELD_OUT, len(found) // 8), f"held-out part of {Path(origin).name}")


def _divided(rows: Tensor, held_out: int, source: str) -> CalibrationText:
    decide, measure, fit = rows.split([held_out, held_out, len(rows) - 2 * held_out])
    return CalibrationText(fit, decide, measure, source)
