"""Questions about pictures: a few that can be asked of any, or the user's own, with or without their answers."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

from popcompile.runtime.pictures import picture_files
from popcompile.text.documents import json_lines, read_utf8, require_text

#: what is asked of pictures that nothing is known about
QUESTIONS = (
    "Describe this picture.",
    "Which text and which numbers can be read in this picture?",
    "What is in this picture, and where?",
    "Which colours are in this picture, and how many things?",
)
_LINE = 'give {"image": file, "question": text}, and "answer" where it is known'


@dataclass(frozen=True)
class PictureQuestion:
    """answer: None where it is not known."""

    picture: Path
    question: str
    answer: str | None = None


def picture_questions(folder: Path, file: Path | None, count: int, seed: int) -> list[PictureQuestion]:
    """At most so many questions about the pictures in a folder: those of a .jsonl file, whose lines name the pictures,
    or QUESTIONS, each picture once before one is asked about again. More of them are drawn from by the seed.

    Raises PopcompileError where there are none, and for a line that is none.
    """
    pictures, choice = picture_files(folder, "--images"), random.Random(seed)
    if file is not None:
        asked = _read(file, folder)
        return choice.sample(asked, min(count, len(asked)))
    choice.shuffle(pictures)
    rounds = range(len(QUESTIONS))
    pairs = [(picture, QUESTIONS[(i + turn) % len(QUESTIONS)]) for turn in rounds for i, picture in enumerate(pictures)]
    return [PictureQuestion(*pair) for pair in pairs[:count]]


def _read(file: Path, folder: Path) -> list[PictureQuestion]:
    found = []
    for content, place in json_lines(read_utf8(file), str(file)):
        line = content if isinstance(content, dict) else {}
        picture, question = (
            require_text(line.get(name), place, f"has no {name}; {_LINE}") for name in ("image", "question")
        )
        answer = line.get("answer")
        if answer is not None:
            answer = require_text(answer, place, f"has an answer that is no text; {_LINE}")
        found.append(PictureQuestion(folder / picture, question, answer))
    return found
