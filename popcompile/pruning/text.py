"""The text that a conversion calibrates on, the part of it that decides, and the part that measures what came out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from popcompile.errors import PopcompileError
from popcompile.passes import Program
from popcompile.pruning.analyze import sample_texts
from popcompile.pruning.execution import Reader
from popcompile.pruning.importance import random_stream
from popcompile.pruning.rows import AskedRows, Rows
from popcompile.pruning.steps import COMPUTED, Steps
from popcompile.text.documents import read_texts, windows
from popcompile.text.lists import retrieval_text

#: "--calibration self": text sampled from the model itself; what the report calls it
SELF, _SAMPLED = "self", "text sampled from the model itself"
#: texts to calibrate on, texts to choose by, as many to measure the result on, and tokens of each
TEXTS, HELD_OUT, TOKENS = 104, 12, 320
#: the least that calibration makes sense with; and texts that a standard error can be told from
FEWEST, _SHORTEST, _FEWEST_HELD_OUT = 8, 64, 2
#: tokens at a prompt's end that take the whole model; and windows that a text holds, at least
WINDOW, WINDOWS = 64, 4
#: texts whose answers stand in them, for each other one that maps are fitted to; and tokens of their lists, at least
RETRIEVAL, _LISTED = 0.2, 32
#: such texts that refinement takes besides
_REFINING = 128
#: of such texts that decide or measure: tokens that ask, after the prompt; tokens of all of them; the most and the
#: fewest texts. Answers differ more from text to text than first tokens do
_ASKING, _ASKED_TOKENS, _MOST_ASKED, _FEWEST_ASKED = 128, 32_768, 28, 4


@dataclass(frozen=True)
class CalibrationText:
    """calibration, held_out and unseen: rows of one length. source: what they are, for the report.

    Maps are fitted to `calibration`, `held_out` decides between them, and `unseen` has a part in neither. Where nothing
    is to be decided the two are one. Of both there are texts as well whose answers stand in the prompt, their
    first `asked_tokens`; some rows of calibration are such, and refinement has more of them, as long as these.
    """

    calibration: Rows
    held_out: Rows
    unseen: Rows
    source: str
    retrieval_refinement: AskedRows | None = None
    retrieval_held_out: AskedRows | None = None
    retrieval_unseen: AskedRows | None = None
    asked_tokens: int | None = None

    @property
    def prompt(self) -> int:
        """Tokens of a held-out text that are its prompt, four fifths; the others are its continuation."""
        return self.held_out.length * 4 // 5


def calibration_text(
    origin: str,
    program: Program,
    read: Reader,
    tokenizer: PreTrainedTokenizerBase | None,
    *,
    texts: int = TEXTS,
    window: int = 1,
    prompt_tokens: int = 0,
    least: int = 0,
    decides: bool = True,
    seed: int = 0,
    steps: Steps = COMPUTED,
    progress: Callable[[int, int], Any] | None = None,
) -> CalibrationText:
    """origin: "self" or a text file (text/documents.py says of what kinds). program: canonical. texts: how many to
    calibrate on. window: tokens at a prompt's end that take the whole model; texts are long enough for prompts of
    several windows. prompt_tokens: of the prompts in which answers stand, where that is more than the others have and
    the context allows. least: tokens of a text, at least, if the context allows. decides: whether maps are to be chosen
    between; else nothing but the measuring text is held out, and less of it the fewer the texts. steps: keep
    what is sampled.

    Raises PopcompileError where the file cannot be used or the model's context is too short.
    """
    tokens = min(max(TOKENS, WINDOWS * window, least), program.max_positions)
    if tokens < _SHORTEST:
        raise PopcompileError(
            f"the model's context of {tokens} tokens is too short to calibrate on ({_SHORTEST} are needed); give"
            " --kv-projection layer"
        )
    held_out, parts = (HELD_OUT, 2) if decides else (max(_FEWEST_HELD_OUT, min(HELD_OUT, texts // 8)), 1)
    count = texts + parts * held_out
    if origin == SELF:
        sampled = steps.tensors(
            "text", lambda: {"ids": sample_texts(program, read, tokenizer, count, tokens, seed, progress).ids}
        )
        rows, source = Rows(sampled["ids"]), _SAMPLED
    else:
        rows, source = _read(origin, tokenizer, count, tokens, seed), f"held-out part of {Path(origin).name}"
    if len(rows) < count:
        held_out = min(held_out, len(rows) // 8)
    decide = rows[:held_out]
    measure = rows[held_out : 2 * held_out] if decides else decide
    divided = CalibrationText(rows[parts * held_out :], decide, measure, source)
    lists = _MOST_ASKED if decides else _MOST_ASKED * held_out // HELD_OUT
    return _with_retrieval(divided, tokenizer, window, prompt_tokens, program.max_positions, lists, seed)


def _read(origin: str, tokenizer: PreTrainedTokenizerBase | None, count: int, tokens: int, seed: int) -> Rows:
    """As many pieces of the file as it has, [count, tokens] at most."""
    documents = read_texts(Path(origin))
    if tokenizer is None:
        raise PopcompileError(f"--calibration {origin}: the model has no tokenizer; give --calibration {SELF}")
    found = windows(tokenizer, documents, count, tokens, seed, origin)
    if len(found) < FEWEST:
        raise PopcompileError(
            f"--calibration {origin}: too short, it has {len(found)} pieces of {tokens} tokens and needs {FEWEST};"
            f" give more text, or --calibration {SELF}"
        )
    return Rows(torch.stack(found))


def _with_retrieval(
    text: CalibrationText,
    tokenizer: PreTrainedTokenizerBase | None,
    window: int,
    prompt_tokens: int,
    context: int,
    lists: int,
    seed: int,
) -> CalibrationText:
    """The text with self-made ones whose answers stand in them, where the tokenizer allows and they have the room.

    context: tokens that the model has room for. lists: the most that decide, and that measure.
    """
    tokens, listed = text.calibration.length, text.prompt - window
    if tokenizer is None or window == 1 or listed < _LISTED:
        return text
    prompt = max(text.prompt, min(prompt_tokens, context - _ASKING))
    long = min(prompt + _ASKING, context)
    count = max(_FEWEST_ASKED, min(lists, _ASKED_TOKENS // long))
    few = max(1, round(len(text.calibration) * RETRIEVAL))
    fit = retrieval_text(tokenizer, few, tokens, listed, random_stream(seed, "retrieval"))
    parts = 1 if text.unseen is text.held_out else 2
    made = retrieval_text(tokenizer, parts * count, long, prompt - window, random_stream(seed, "asked"))
    refine = retrieval_text(tokenizer, _REFINING, tokens, listed, random_stream(seed, "refinement"))
    if fit is None or refine is None or made is None or not made.answers[:, prompt:].any(1).all():
        return text
    decide, measure = AskedRows.of(made).split(count)
    return replace(
        text,
        calibration=Rows(torch.cat((text.calibration.ids, fit.rows))),
        retrieval_refinement=AskedRows.of(refine),
        retrieval_held_out=decide,
        retrieval_unseen=measure if parts == 2 else decide,
        asked_tokens=prompt,
    )
