"""The prompts with images that a conversion calibrates on, those that decide, and those that measure what came out.

A prompt is a turn of the chat template with one picture or two, a question, and text before or behind the pictures that
fills it up; the model's own answer follows, as in sampled text. Pictures are self-made (text/pictures.py), of text that
the other rows are, or the user's. In some a list stands, and what follows asks for its values.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase

from popcompile.errors import PopcompileError
from popcompile.passes import Program
from popcompile.pruning.execution import Reader
from popcompile.pruning.image_prompts import ImagePrompt, ImagePrompts, ImageSource
from popcompile.pruning.importance import random_stream
from popcompile.pruning.picture_files import read_pictures
from popcompile.pruning.rows import AskedRows, Rows
from popcompile.pruning.sampling import sample_behind
from popcompile.pruning.steps import COMPUTED, Steps
from popcompile.pruning.text import RETRIEVAL, CalibrationText
from popcompile.text.lists import FORMS, OF_WORDS, Form, ask, draw_value, find_words, token_count
from popcompile.text.pictures import Size, draw_lines, draw_picture, draw_table, is_legible

QUESTIONS = (
    "Describe this picture.",
    "What is written here?",
    "Summarize what you see in one sentence.",
    "Which numbers are there?",
    "What is this about?",
    "What stands out, and where?",
    "Read the first line.",
    "What could somebody need this for?",
    "Compare what is at the top with what is at the bottom.",
    "List all that you recognize.",
)
#: what the values of a list are asked for by, after which they follow
_ASK = "Write down again what is listed in the picture, in another order."
#: the share of a prompt that its pictures take, and of a list's
_SHARES, _LISTED_SHARES = (0.2, 0.95), (0.1, 0.35)
#: width by height, and the share of prompts that have two pictures
_RATIOS, _TWO = (0.4, 2.5), 0.25
#: pairs of a list that stands in a picture, and how often a picture of another size is tried that has room for so many
_PAIRS, _TRIES = (4, 14), 8
#: words that lists need, at least
_FEWEST = 40

#: draws a picture of at most so many pixels
_Draw = Callable[[float], Image.Image]


def image_calibration(
    source: ImageSource,
    prompts: ImagePrompts,
    program: Program,
    read: Reader,
    text: CalibrationText,
    *,
    texts: int,
    seed: int,
    steps: Steps = COMPUTED,
    progress: Callable[[int, int], Any] | None = None,
) -> CalibrationText:
    """`texts` rows to calibrate on, and as many and as long ones that decide and that measure as `text` has.

    text: where lists are asked for, they are in pictures as well. Each part of its rows fills up prompts of the same
    part. Raises PopcompileError where the processor refuses a prompt.
    """
    maker = _Maker(source, prompts, seed)
    parts = [(text.calibration, texts), (text.unseen, len(text.unseen)), (text.held_out, len(text.held_out))]
    if text.unseen is text.held_out:  # there is nothing to decide
        parts.pop()
    pictures = [None] * 3 if source.pictures is None else _divided(read_pictures(source.pictures, seed), seed)
    written = [
        prompt
        for (rows, count), theirs in zip(parts, pictures, strict=False)
        for prompt in maker.described(rows, count, text.prompt, theirs)
    ]
    rows, given = prompts.rows(written, text.calibration.length), [text.prompt] * len(written)
    stream = random_stream(seed, "answers about images")
    sampled = steps.tensors(
        "answers_about_images", lambda: {"ids": sample_behind(program, read, rows, given, stream, progress).ids}
    )
    rows = replace(rows, ids=sampled["ids"])
    unseen = rows[texts : texts + len(text.unseen)]
    decide = rows[texts + len(text.unseen) :] if len(parts) == 3 else unseen
    named = "self-made pictures" if source.pictures is None else f"pictures of {source.pictures.name}"
    return maker.with_lists(CalibrationText(rows[:texts], decide, unseen, named), text)


def _divided(pictures: list[Image.Image], seed: int) -> list[list[Image.Image]]:
    """Those that are calibrated on, that measure, and that decide; the same ones where they are few."""
    if len(pictures) < 3:
        return [pictures] * 3
    random.Random(seed).shuffle(pictures)
    few = max(1, len(pictures) // 8)
    return [pictures[2 * few :], pictures[:few], pictures[few : 2 * few]]


class _Maker:
    """Makes prompts with images. Their `text` is rows whose tokens fill them up, and that self-made pictures show."""

    def __init__(self, source: ImageSource, prompts: ImagePrompts, seed: int) -> None:
        self._source, self._prompts = source, prompts
        self._choice = random.Random(random_stream(seed, "images"))
        words = [word for word in find_words(prompts.tokenizer, seed) if is_legible(word)]
        self._words = words if len(words) >= _FEWEST else []

    def described(
        self, text: Rows, count: int, tokens: int, pictures: Sequence[Image.Image] | None
    ) -> list[ImagePrompt]:
        """Prompts of so many tokens that ask about pictures, by default self-made ones."""
        prompts = []
        for i in range(count):
            shown = range(i, i + (2 if self._source.inputs.merge and self._choice.random() < _TWO else 1))
            if pictures is None:
                draw = [self._page(text, j) for j in shown]
            else:
                draw = [partial(_reduced, pictures[j % len(pictures)]) for j in shown]
            question = self._choice.choice(QUESTIONS)
            prompts.append(self._fitting(draw, question, _tokens_from(text, i, tokens), tokens, _SHARES))
        return prompts

    def _page(self, text: Rows, row: int) -> _Draw:
        written = str(self._prompts.tokenizer.decode(text.ids[row % len(text)], skip_special_tokens=True))
        words = self._words or written.split() or ["0"]
        return lambda pixels: draw_picture(written, words, self._size(pixels), self._choice)

    def _size(self, pixels: float) -> Size:
        """Of a picture of so many pixels, of any form."""
        ratio = self._choice.uniform(*_RATIOS)
        return max(1, round((pixels * ratio) ** 0.5)), max(1, round((pixels / ratio) ** 0.5))

    def _fitting(
        self, draw: Sequence[_Draw], question: str, text: Sequence[int], tokens: int, shares: tuple[float, float]
    ) -> ImagePrompt:
        """A prompt of so many tokens with these pictures, which are drawn smaller until there is room for them."""
        pixels = self._choice.uniform(*shares) * tokens * self._source.side**2 / len(draw)
        at = self._choice.choice((0, len(draw)))
        while pixels >= 1:
            pictures = [one(pixels) for one in draw]
            if (prompt := self._prompts.write([*pictures, question], tokens, text, at)) is not None:
                return prompt
            pixels /= 2
        raise PopcompileError(
            f"a prompt of {tokens} tokens has no room for {question!r} and the smallest picture that the model's"
            " processor makes; give --kv-projection layer with --prune 1/3 or --layers, which ask nothing"
        )

    def with_lists(self, found: CalibrationText, text: CalibrationText) -> CalibrationText:
        """With rows whose answers stand in pictures, half as many as `text` has; for refinement a quarter."""
        if text.asked_tokens is None or text.retrieval_held_out is None or text.retrieval_refinement is None:
            return found
        count, long = len(text.retrieval_held_out.rows) // 2, text.retrieval_held_out.rows.length
        refine, few = len(text.retrieval_refinement.rows) // 4, max(1, round(len(found.calibration) * RETRIEVAL))
        unseen = self.asked(text.unseen, count, text.asked_tokens, long)
        decide = unseen
        if text.unseen is not text.held_out:
            decide = self.asked(text.held_out, count, text.asked_tokens, long)
        lists = self.asked(text.calibration, refine + few, text.prompt, text.calibration.length)
        if decide is None or unseen is None or lists is None:
            return found
        refined, fitted = lists.split(refine)
        return replace(
            found,
            calibration=found.calibration.joined(fitted.rows),
            retrieval_refinement=refined,
            retrieval_held_out=decide,
            retrieval_unseen=unseen,
            asked_tokens=text.asked_tokens,
        )

    def asked(self, text: Rows, count: int, tokens: int, length: int) -> AskedRows | None:
        """Rows of so many tokens, the first `tokens` of which are a prompt with a list in a picture. None where
        pictures have no room for lists, or the tokenizer does not tell what tokens stand for.
        """
        prompts, ids, answers = [], [], []
        for i in range(count if self._words else 0):
            listed = _List(FORMS[i % len(FORMS)], self._values(), self._size, self._choice)
            filling = _tokens_from(text, i, tokens)
            for _ in range(_TRIES):
                prompt = self._fitting([listed.draw], _ASK, filling, tokens, _LISTED_SHARES)
                if len(listed.shown) >= _PAIRS[0]:
                    break
            else:
                return None
            prompts.append(prompt)
            asked, of_answer = listed.ask(self._prompts.tokenizer, length - tokens)
            if len(asked) < length - tokens or not any(of_answer):
                return None
            ids.append(asked[: length - tokens])
            answers.append([False] * tokens + of_answer[: length - tokens])
        if not prompts:
            return None
        rows = self._prompts.rows(prompts, length)
        rows.ids[:, tokens:] = torch.tensor(ids)
        return AskedRows(rows, torch.tensor(answers))

    def _values(self) -> dict[str, str]:
        of_words = self._choice.random() < OF_WORDS
        keys = self._choice.sample(self._words, self._choice.randint(*_PAIRS))
        return {key: draw_value(self._words, of_words, self._choice) for key in keys}


class _List:
    """Keys and values that stand in a picture, in a form, and are asked for. shown: those that it has room for."""

    def __init__(
        self, form: Form, values: dict[str, str], size: Callable[[float], Size], choice: random.Random
    ) -> None:
        self._form, self._values, self._size, self._choice = form, values, size, choice
        self.shown: dict[str, str] = {}

    def draw(self, pixels: float) -> Image.Image:
        opening, line, _ = self._form
        size, items = self._size(pixels), list(self._values.items())
        if opening.startswith("|"):
            names = [part.strip() for part in opening.split("|")[1:3]]
            picture, rows, columns = draw_table([names, *items], size, self._choice)
            count = max(0, rows - 1) if columns == len(names) else 0
        else:
            lines = [value.join(line(key)) for key, value in items]
            picture, rows = draw_lines([opening, *lines], size, self._choice)
            count = max(0, rows - 1)
        self.shown = dict(items[:count])
        return picture

    def ask(self, tokenizer: PreTrainedTokenizerBase, tokens: int) -> tuple[list[int], list[bool]]:
        """At least so many token ids that ask for what is shown, and whether each is a part of an answer."""
        _, line, between = self._form
        opening = between.lstrip()
        length = token_count(tokenizer, opening)
        return ask(tokenizer, opening, line, self.shown, tokens, length, self._choice, begins=False)


def _tokens_from(text: Rows, row: int, count: int) -> list[int]:
    """At least so many tokens of rows from this one on."""
    rows = torch.arange(row, row + 1 + count // text.length) % len(text)
    return text.ids[rows].flatten().tolist()


def _reduced(picture: Image.Image, pixels: float) -> Image.Image:
    """The picture, smaller where it has more pixels."""
    factor = min(1.0, (pixels / (picture.width * picture.height)) ** 0.5)
    return picture.resize((max(1, round(picture.width * factor)), max(1, round(picture.height * factor))))
