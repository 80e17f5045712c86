"""The text that a conversion calibrates on, the part of it that decides, and the part that measures what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from popcompile.analysis import sample_texts
from popcompile.errors import PopcompileError
from popcompile.execution import Reader
from popcompile.importance import random_stream
from popcompile.passes import Program
from popcompile.retrieval_text import RetrievalText, retrieval_text
from popcompile.texts import read_texts, windows

#: "--calibration self": text sampled from the model itself
SELF = "self"
#: texts to calibrate on, texts to choose by, as many to measure the result on, and tokens of each
TEXTS, HELD_OUT, TOKENS = 104, 12, 320
#: the least that calibration makes sense with
FEWEST, _SHORTEST = 8, 64
#: tokens at a prompt's end that take the whole model; and windows that a text holds, at least
WINDOW, WINDOWS = 64, 4
#: texts whose answers stand in them, for each other one that maps are fitted to; and tokens of their lists, at least
_RETRIEVAL, _LISTED = 0.2, 32
#: the same for each other one that decides or measures: answers differ more than first tokens do
_RETRIEVAL_MEASURED = 2
#: of such texts that are as long as prompts: tokens after the prompt, tokens of all of them, and the fewest
_ASKED, _LONG_TOKENS, _FEWEST_LONG = 64, 16_384, 4


@dataclass(frozen=True)
class CalibrationText:
    """calibration [N, T], held_out and unseen [M, T]: token ids. source: what they are, for the report.

    Maps are fitted to `calibration`, `held_out` decides between them, and `unseen` has a part in neither. Of the last
    two there are texts whose answers stand in the prompt as well, in calibration some of the rows are such.
    """

    calibration: Tensor
    held_out: Tensor
    unseen: Tensor
    source: str
    retrieval_held_out: RetrievalText | None = None
    retrieval_unseen: RetrievalText | None = None
    retrieval_long: RetrievalText | None = None

    @property
    def prompt(self) -> int:
        """Tokens of a held-out text that are its prompt, four fifths; the others are its continuation."""
        return self.held_out.shape[1] * 4 // 5

    @property
    def long_prompt(self) -> int:
        """Tokens of a text of retrieval_long that are its prompt."""
        assert self.retrieval_long is not None
        return self.retrieval_long.rows.shape[1] - _ASKED


def calibration_text(
    origin: str,
    program: Program,
    read: Reader,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    texts: int = TEXTS,
    window: int = 1,
    prompt_tokens: int = 0,
    seed: int = 0,
    progress: Callable[[int, int], Any] | None = None,
) -> CalibrationText:
    """origin: "self" or a text file (popcompile/texts.py says of what kinds). program: canonical. window: tokens at a
    prompt's end that take the whole model; texts are long enough for prompts of several windows. prompt_tokens: of
    retrieval_long, which there is where that is more than the others' prompts have.

    Raises PopcompileError where the file cannot be used or the model's context is too short.
    """
    tokens = min(max(TOKENS, WINDOWS * window), program.max_positions)
    long = min(prompt_tokens, program.max_positions - _ASKED)
    if tokens < _SHORTEST:
        raise PopcompileError(
            f"the model's context of {tokens} tokens is too short to calibrate on ({_SHORTEST} are needed); give"
            " --kv-projection layer"
        )
    if origin == SELF:
        rows = sample_texts(program, read, tokenizer, texts + 2 * HELD_OUT, tokens, seed, progress)
        return _with_retrieval(
            _divided(rows, HELD_OUT, "text sampled from the model itself"), tokenizer, window, long, seed
        )
    documents = read_texts(Path(origin))
    if tokenizer is None:
        raise PopcompileError(f"--calibration {origin}: the model has no tokenizer; give --calibration {SELF}")
    found = windows(tokenizer, documents, texts + 2 * HELD_OUT, tokens, seed, origin)
    if len(found) < FEWEST:
        raise PopcompileError(
            f"--calibration {origin}: too short, it has {len(found)} pieces of {tokens} tokens and needs {FEWEST};"
            f" give more text, or --calibration {SELF}"
        )
    divided = _divided(torch.stack(found), min(HELD_OUT, len(found) // 8), f"held-out part of {Path(origin).name}")
    return _with_retrieval(divided, tokenizer, window, long, seed)


def _divided(rows: Tensor, held_out: int, source: str) -> CalibrationText:
    decide, measure, fit = rows.split([held_out, held_out, len(rows) - 2 * held_out])
    return CalibrationText(fit, decide, measure, source)


def _with_retrieval(
    text: CalibrationText, tokenizer: PreTrainedTokenizerBase | None, window: int, long: int, seed: int
) -> CalibrationText:
    """The text with self-made ones whose answers stand in them, where the tokenizer allows and they have the room.

    long: tokens of the prompts of retrieval_long.
    """
    tokens, listed = text.calibration.shape[1], text.prompt - window
    if tokenizer is None or window == 1 or listed < _LISTED:
        return text
    measured = (_RETRIEVAL_MEASURED * len(part) for part in (text.held_out, text.unseen))
    counts = [max(1, round(len(text.calibration) * _RETRIEVAL)), *measured]
    made = retrieval_text(tokenizer, sum(counts), tokens, listed, random_stream(seed, "retrieval"))
    if made is None or not made.answers[:, text.prompt :].any(1).all():
        return text
    fit, decide, measure = (
        RetrievalText(rows, answers)
        for rows, answers in zip(made.rows.split(counts), made.answers.split(counts), strict=True)
    )
    return replace(
        text,
        calibration=torch.cat((text.calibration, fit.rows)),
        retrieval_held_out=decide,
        retrieval_unseen=measure,
        retrieval_long=_long(tokenizer, long, window, seed) if long > text.prompt else None,
    )


def _long(tokenizer: PreTrainedTokenizerBase, prompt: int, window: int, seed: int) -> RetrievalText | None:
    tokens = prompt + _ASKED
    count = max(_FEWEST_LONG, min(HELD_OUT, _LONG_TOKENS // tokens))
    made = retrieval_text(tokenizer, count, tokens, prompt - window, random_stream(seed, "long retrieval"))
    return made if made is not None and made.answers[:, prompt:].any(1).all() else None
