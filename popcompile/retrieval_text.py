"""Self-made texts whose answers stand in them: keys and values, listed, then asked for again in another order.

Ordinary text hardly shows whether a model still finds what stands in its prompt: most of it can be guessed from the
words just before. Here each answer is a random word or number that stands once in the context, so that nothing but the
context's cache entries can tell it. Words come from the tokenizer's vocabulary, so the texts are in its languages.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

#: how a pair is written, as what stands before the value and after it
_Line = Callable[[str], tuple[str, str]]

#: of each form: what the list begins with, a pair, and what stands between list and questions
_FORMS: tuple[tuple[str, _Line, str], ...] = (
    ("Codes:\n", lambda key: (f"The code of {key} is ", ".\n"), "\nAgain:\n"),
    ("| name | value |\n|---|---|\n", lambda key: (f"| {key} | ", " |\n"), "\n| name | value |\n|---|---|\n"),
    ("{\n", lambda key: (f'  "{key}": "', '",\n'), "}\n{\n"),
    ("Notes. ", lambda key: (f"For {key} we wrote down ", ". "), "\n\nIn short: "),
)
#: words to draw from, and how many of the vocabulary's tokens are looked at for them
_WORDS, _TRIES = 400, 20_000
_LETTERS = range(3, 13)  # of a word


@dataclass(frozen=True)
class RetrievalText:
    """rows [N, T] int64: token ids. answers [N, T]: whether a token is, or is a part of, a value that was asked for."""

    rows: Tensor
    answers: Tensor


def retrieval_text(
    tokenizer: PreTrainedTokenizerBase, count: int, tokens: int, listed: int, seed: int
) -> RetrievalText | None:
    """`count` texts of `tokens` tokens, of which about `listed` are the list and the others ask for what stands in it.

    None where the tokenizer does not tell which characters a token stands for, or knows too few words.
    """
    words = _words(tokenizer, seed)
    if not tokenizer.is_fast or len(words) < _WORDS // 4:
        return None
    choice = random.Random(seed)
    rows, answers = [], []
    for number in range(count):
        while True:
            ids, asked = _text(tokenizer, _FORMS[number % len(_FORMS)], words, tokens, listed, choice)
            if len(ids) >= tokens:
                break
        rows.append(ids[:tokens])
        answers.append(asked[:tokens])
    return RetrievalText(torch.tensor(rows), torch.tensor(answers))


def _text(
    tokenizer: PreTrainedTokenizerBase,
    form: tuple[str, _Line, str],
    words: Sequence[str],
    tokens: int,
    listed: int,
    choice: random.Random,
) -> tuple[list[int], list[bool]]:
    """Token ids and whether each is a part of an answer."""
    opening, line, between = form
    keys = choice.sample(words, len(words))
    of_words = choice.random() < 0.3
    values = {key: choice.choice(words) if of_words else str(choice.randint(1000, 9999)) for key in keys}
    text, pairs = opening, []
    for key in keys:
        before, after = line(key)
        text += before + values[key] + after
        pairs.append(key)
        if len(tokenizer(text, add_special_tokens=False)["input_ids"]) >= listed:
            break
    text += between
    spans: list[tuple[int, int]] = []
    while len(text) < 12 * tokens:  # more characters than tokens have
        for key in choice.sample(pairs, len(pairs)):
            before, after = line(key)
            begin = len(text) + len(before)
            spans.append((begin, begin + len(values[key])))
            text += before + values[key] + after
    encoded = tokenizer(text, return_offsets_mapping=True, verbose=False)
    ids, places = encoded["input_ids"], encoded["offset_mapping"]
    asked, span = [], 0
    for begin, end in places:
        while span < len(spans) and spans[span][1] <= begin:
            span += 1
        asked.append(end > begin and span < len(spans) and end > spans[span][0])
    return list(ids), asked


def _words(tokenizer: PreTrainedTokenizerBase, seed: int) -> list[str]:
    """Words that are a token of the vocabulary each, in an order of the seed's."""
    ordinary = sorted(set(range(len(tokenizer))) - {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})
    choice = random.Random(seed)
    found: dict[str, None] = {}
    for token in choice.sample(ordinary, min(_TRIES, len(ordinary))):
        word = str(tokenizer.decode([token])).strip()
        if word.isalpha() and len(word) in _LETTERS and word == word.lower():
            found.setdefault(word)
        if len(found) == _WORDS:
            break
    return list(found)
