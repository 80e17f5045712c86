"""Facts that stand in a prompt and are asked for at its end: does a pruned prefill still find them?

    list       lines of keys and values (text/lists.py has their forms), one of which is asked for
    passage    text with one sentence in it that is asked for ("needle in a haystack")

What is asked for stands at a depth of 0 to 100% of the prompt. A question is answered where every token of the answer
is the likeliest after the prompt and the tokens before it, which is what greedy decoding would write.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from popcompile.text.documents import windows
from popcompile.text.lists import FORMS, OF_WORDS, Form, draw_value, find_words, token_count

#: of the prompt, where what is asked for stands
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
KINDS = ("list", "passage")
#: tokens by which parts of a text may grow together, and the shortest passage
_SPARE, _SHORTEST = 8, 16
_FACT = "The code of {} is "


@dataclass(frozen=True)
class Question:
    """prompt [S], answer [A]: token ids, int64, as the tokenizer makes them of the text of both."""

    kind: str
    depth: float
    prompt: Tensor
    answer: Tensor


def questions(
    tokenizer: PreTrainedTokenizerBase, documents: list[str], count: int, tokens: int, seed: int
) -> list[Question]:
    """`count` questions of each kind, with prompts of at most `tokens` tokens. documents: what passages are cut from.

    Fewer where a prompt of this length has no room, and none where the tokenizer knows too few words (find_words).
    Raises PopcompileError where the documents are too short for a passage.
    """
    words = find_words(tokenizer, seed)
    if not words:
        return []
    choice = random.Random(seed)
    found = []
    for index in range(count):
        depth, form = DEPTHS[index % len(DEPTHS)], FORMS[index // len(DEPTHS) % len(FORMS)]
        found.append(_of_list(tokenizer, form, words, depth, tokens, choice))
    overhead = 2 * token_count(tokenizer, _FACT.format(words[0])) + token_count(tokenizer, "\n\n 1000.") + _SPARE
    if count and tokens - overhead >= _SHORTEST:
        passages = windows(tokenizer, documents, count, tokens - overhead, seed, "passages")
        for index in range(count):
            depth, passage = DEPTHS[index % len(DEPTHS)], passages[index % len(passages)]
            text = str(tokenizer.decode(passage, skip_special_tokens=True))
            found.append(_of_passage(tokenizer, text, words, depth, choice))
    return [question for question in found if question is not None and len(question.prompt) <= tokens]


def _of_list(
    tokenizer: PreTrainedTokenizerBase,
    form: Form,
    words: Sequence[str],
    depth: float,
    tokens: int,
    choice: random.Random,
) -> Question | None:
    opening, line, between = form
    of_words = choice.random() < OF_WORDS
    left = tokens - token_count(tokenizer, opening + between + line(words[0])[0]) - _SPARE
    values: dict[str, str] = {}
    for key in choice.sample(words, len(words)):
        value = draw_value(words, of_words, choice)
        left -= token_count(tokenizer, value.join(line(key)))
        if left < 0:
            break
        values[key] = value
    if not values:
        return None
    key = list(values)[round(depth * (len(values) - 1))]
    text = opening + "".join(value.join(line(name)) for name, value in values.items()) + between + line(key)[0]
    return _question(tokenizer, "list", depth, text, values[key], line(key)[1])


def _of_passage(
    tokenizer: PreTrainedTokenizerBase, passage: str, words: Sequence[str], depth: float, choice: random.Random
) -> Question | None:
    asked = _FACT.format(choice.choice(words))
    value = draw_value(words, choice.random() < OF_WORDS, choice)
    parts = passage.split(" ")
    place = round(depth * len(parts))
    text = " ".join([*parts[:place], f"{asked}{value}.", *parts[place:]])
    return _question(tokenizer, "passage", depth, f"{text}\n\n{asked}", value, ".")


def _question(
    tokenizer: PreTrainedTokenizerBase, kind: str, depth: float, text: str, value: str, ending: str
) -> Question | None:
    """Of a prompt's text and the answer's, divided where the answer's first token begins."""
    encoded = tokenizer(text + value + ending, return_offsets_mapping=True, verbose=False)
    ids = torch.tensor(encoded["input_ids"], dtype=torch.int64)
    begin, end = len(text), len(text) + len(value)
    tokens = [i for i, (first, last) in enumerate(encoded["offset_mapping"]) if last > begin and first < end]
    return Question(kind, depth, ids[: tokens[0]], ids[tokens[0] : tokens[-1] + 1]) if tokens else None


def is_answered(logits: Tensor, answer: Tensor) -> bool:
    """logits [A, vocabulary]: what predicts each token of answer [A]."""
    return bool((logits.argmax(-1) == answer).all())
