"""Self-made texts whose answers stand in them: keys and values, listed, then asked for again in another order.

Ordinary text hardly shows whether a model still finds what stands in its prompt: most of it can be guessed from the
words just before. Here each answer is a random word or number that stands once in the context, so that nothing but the
context's cache entries can tell it. Words come from the tokenizer's vocabulary, so the texts are in its languages.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

#: how a pair is written, as what stands before the value and after it
_Line = Callable[[str], tuple[str, str]]
#: what a list begins with, a pair, and what stands between list and questions
Form = tuple[str, _Line, str]

FORMS: tuple[Form, ...] = (
    ("Codes:\n", lambda key: (f"The code of {key} is ", ".\n"), "\nAgain:\n"),
    ("| name | value |\n|---|---|\n", lambda key: (f"| {key} | ", " |\n"), "\n| name | value |\n|---|---|\n"),
    ("{\n", lambda key: (f'  "{key}": "', '",\n'), "}\n{\n"),
    ("Notes. ", lambda key: (f"For {key} we wrote down ", ". "), "\n\nIn short: "),
)
#: words to draw from, how many of the vocabulary's tokens are looked at for them, and the fewest to use
_WORDS, _TRIES, _FEWEST = 400, 20_000, 100
_LETTERS = range(3, 13)  # of a word
#: the share of texts whose values are words; and the share of tokens that are made beyond those asked for, as lines
#: have fewer tokens together than each on its own
OF_WORDS, _SPARE = 0.3, 0.25


@dataclass(frozen=True)
class RetrievalText:
    """rows [N, T] int64: token ids. answers [N, T]: whether a token is, or is a part of, a value that was asked for."""

    rows: Tensor
    answers: Tensor


def retrieval_text(
    tokenizer: PreTrainedTokenizerBase, count: int, tokens: int, listed: int, seed: int
) -> RetrievalText | None:
    """`count` texts of `tokens` tokens, of which about `listed` are the list and the others ask for what stands in it.

    None where the tokenizer does not tell which characters a token stands for, knows too few words, or makes far fewer
    tokens of a text than of its lines.
    """
    words = find_words(tokenizer, seed)
    if not words:
        return None
    choice = random.Random(seed)
    made = [_text(tokenizer, FORMS[i % len(FORMS)], words, tokens, listed, choice) for i in range(count)]
    if any(len(ids) < tokens for ids, _ in made):
        return None
    rows, answers = ([part[:tokens] for part in parts] for parts in zip(*made, strict=True))
    return RetrievalText(torch.tensor(rows), torch.tensor(answers))


def _text(
    tokenizer: PreTrainedTokenizerBase,
    form: Form,
    words: Sequence[str],
    tokens: int,
    listed: int,
    choice: random.Random,
) -> tuple[list[int], list[bool]]:
    """Token ids, more than `tokens` of them, and whether each is a part of an answer."""
    opening, line, between = form
    of_words = choice.random() < OF_WORDS
    values: dict[str, str] = {}
    text, length = opening, token_count(tokenizer, opening)
    for key in choice.sample(words, len(words)):
        if length >= listed:
            break
        values[key] = draw_value(words, of_words, choice)
        text += values[key].join(line(key))
        length += token_count(tokenizer, values[key].join(line(key)))
    return ask(tokenizer, text + between, line, values, tokens, length, choice)


def ask(
    tokenizer: PreTrainedTokenizerBase,
    text: str,
    line: _Line,
    values: Mapping[str, str],
    tokens: int,
    length: int,
    choice: random.Random,
    *,
    begins: bool = True,
) -> tuple[list[int], list[bool]]:
    """Token ids of the text, which has about `length` of them, and of lines behind it that ask for the values: more
    than `tokens` in all; and whether each is a part of an answer. begins: whether it has what the tokenizer puts before
    a text.
    """
    spans: list[tuple[int, int]] = []
    asked: list[str] = []
    while length < tokens * (1 + _SPARE):
        asked = asked or choice.sample(list(values), len(values))  # all of them, before one is asked for again
        key = asked.pop()
        begin = len(text) + len(line(key)[0])
        spans.append((begin, begin + len(values[key])))
        text += values[key].join(line(key))
        length += token_count(tokenizer, values[key].join(line(key)))
    encoded = tokenizer(text, return_offsets_mapping=True, add_special_tokens=begins, verbose=False)
    answers, span = [], 0
    for begin, end in encoded["offset_mapping"]:
        while span < len(spans) and spans[span][1] <= begin:
            span += 1
        answers.append(end > begin and span < len(spans) and end > spans[span][0])
    return list(encoded["input_ids"]), answers


def draw_value(words: Sequence[str], of_words: bool, choice: random.Random) -> str:
    """A word, or else a number of four digits."""
    return choice.choice(words) if of_words else str(choice.randint(1000, 9999))


def token_count(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Tokens of a piece of text on its own, about what it has in a longer one."""
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def find_words(tokenizer: PreTrainedTokenizerBase, seed: int) -> list[str]:
    """Words that are a token of the vocabulary each, in an order of the seed's.

    Empty where there are too few, or where the tokenizer does not tell which characters a token stands for.
    """
    if not tokenizer.is_fast:
        return []
    ordinary = sorted(set(range(len(tokenizer))) - {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})
    choice = random.Random(seed)
    found: dict[str, None] = {}
    for token in choice.sample(ordinary, min(_TRIES, len(ordinary))):
        word = str(tokenizer.decode([token])).strip()
        if word.isalpha() and len(word) in _LETTERS and word == word.lower():
            found.setdefault(word)
        if len(found) == _WORDS:
            break
    return list(found) if len(found) >= _FEWEST else []
