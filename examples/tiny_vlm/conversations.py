"""What the models learn: numbers that stand in a prompt, as text or in pictures, are read, repeated and looked up."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from random import Random
from typing import Any

from .pictures import Picture, draw_number

#: what has a code
NAMES = (
    "ant", "bat", "bear", "bee", "bird", "bull", "cat", "cow", "crab", "crow", "deer", "dog", "dove", "duck", "eel",
    "elk", "fish", "fly", "fox", "frog", "goat", "hare", "hawk", "hen", "ibis", "kid", "kiwi", "lamb", "lark", "lion",
    "lynx", "mole", "moth", "mouse", "mule", "owl", "ox", "pig", "puma", "rat", "seal", "swan", "toad", "wasp",
    "wolf", "worm", "yak", "zebra",
)  # fmt: skip
#: pixels of a picture's width for each digit
_DIGIT = 24
Part = str | Picture
Size = tuple[int, int]


@dataclass(frozen=True)
class Conversation:
    """opening: what stands before the first question. turns: questions and their answers."""

    opening: tuple[Part, ...]
    turns: tuple[tuple[str, str], ...]

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.opening if isinstance(part, Picture)]

    def messages(self) -> list[dict[str, Any]]:
        """Of all turns, in the form that chat templates take."""
        found = []
        for i, (question, answer) in enumerate(self.turns):
            opening = self.opening if i == 0 else ()
            found.append({"role": "user", "content": _contents((*opening, question))})
            found.append({"role": "assistant", "content": _contents((answer,))})
        return found


@dataclass(frozen=True)
class Document:
    """A list that is told twice, with pictures only the first time. No chat: what a model reads before it learns to."""

    opening: tuple[Part, ...]
    again: str

    @property
    def pictures(self) -> list[Picture]:
        return [part for part in self.opening if isinstance(part, Picture)]


def _contents(parts: Sequence[Part]) -> list[dict[str, Any]]:
    """Adjacent text is one part."""
    found: list[dict[str, Any]] = []
    for is_text, group in groupby(parts, lambda part: isinstance(part, str)):
        if is_text:
            found.append({"type": "text", "text": "".join(str(part) for part in group)})
        else:
            found += [{"type": "image", "image": part.image} for part in group if isinstance(part, Picture)]
    return found


def repeat(random: Random, digits: int) -> Conversation:
    """A number to be said again."""
    number = _number(random, digits)
    return Conversation((), ((f"Repeat {number}", number),))


def picture(random: Random, size: Size) -> Conversation:
    """A picture of a number, which is asked for whole, and by its first and last digits, in any order."""
    number = _number(random, random.randint(1, size[0] // _DIGIT))
    turns = [("What is in the picture?", number), ("What is first?", number[0]), ("What is last?", number[-1])]
    random.shuffle(turns)
    return Conversation((draw_number(number, *size, random),), tuple(turns))


@dataclass(frozen=True)
class Codes:
    """How lists of codes are: `listed` of the first `known` NAMES, `pictured` of them in pictures of any of `sizes`."""

    digits: int
    listed: int
    known: int = len(NAMES)
    pictured: int = 0
    sizes: tuple[Size, ...] = ()

    def conversation(self, random: Random, turns: int) -> Conversation:
        """Questions for some codes, for those in pictures where there are any."""
        numbers, opening = self._list(random)
        shown = [name for name, value in zip(numbers, opening[2::2], strict=True) if isinstance(value, Picture)]
        asked = random.sample(shown or list(numbers), min(turns, len(shown or numbers)))
        return Conversation((*opening, "\n"), tuple((f"What is {name}?", numbers[name]) for name in asked))

    def document(self, random: Random) -> Document:
        numbers, opening = self._list(random)
        again = "".join(f" {name}{numbers[name]}" for name in random.sample(list(numbers), self.listed))
        return Document((*opening, "\n"), f"Again:{again}\n")

    def _list(self, random: Random) -> tuple[dict[str, str], list[Part]]:
        """Numbers by name, and the list: a heading, then names and values in turn."""
        numbers = {name: _number(random, self.digits) for name in random.sample(NAMES[: self.known], self.listed)}
        shown = set(random.sample(list(numbers), self.pictured))
        parts: list[Part] = ["Codes"]
        for name, number in numbers.items():
            value = draw_number(number, *random.choice(self.sizes), random) if name in shown else number
            parts += [f" {name}", value]
        return numbers, parts


def _number(random: Random, digits: int) -> str:
    return "".join(random.choice("0123456789") for _ in range(digits))
