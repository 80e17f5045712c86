"""Pictures in a chat, as data: URLs, of a model that takes images."""

from __future__ import annotations

import asyncio
import base64
from pathlib import Path
from typing import Any

import pytest
from openai import AsyncOpenAI, BadRequestError
from served import NAME, Served
from vision_checkpoint import draw_picture

from popcompile.runtime.conversation import Encoder, user_message
from popcompile.runtime.pictures import read_picture
from popcompile.serving.prefix_cache import PrefixCache


@pytest.fixture(scope="module")
def seeing(vision_package: Path) -> Served:
    return Served(vision_package)


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return draw_picture(tmp_path / "a.png", 64, 32)


def _messages(url: str) -> Any:
    parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "the cat"}]
    return [{"role": "user", "content": parts}]


def test_picture(seeing: Served, picture: Path) -> None:
    """The answer is the model's own, and another one than to another picture; nothing of the prompt is kept."""
    prefixes = PrefixCache(1 << 24, 4)
    other = draw_picture(picture.with_name("b.png"), 32, 64)
    answers = []
    for file in (picture, other, picture):
        answer = seeing.ask(
            lambda c, f=file: c.chat.completions.create(model=NAME, messages=_messages(_url(f)), max_tokens=6, n=2),
            seeing.engine(prefixes=prefixes, chunk=4),
        )
        text, length = _expected(seeing, file, 6)
        assert [choice.message.content for choice in answer.choices] == [text, text]
        assert answer.usage is not None and answer.usage.prompt_tokens == length
        answers.append(answer.choices[0].message.content)
    assert answers[0] == answers[2] != answers[1] and prefixes.bytes == 0


def test_pictures_in_a_batch(seeing: Served, picture: Path) -> None:
    """Of unlike sizes, so that positions are behind slots by another distance in each row."""
    files = [
        picture,
        draw_picture(picture.with_name("b.png"), 32, 64),
        draw_picture(picture.with_name("c.png"), 96, 96),
    ]

    async def all_of_them(client: AsyncOpenAI) -> list[str | None]:
        asked = [
            client.chat.completions.create(model=NAME, messages=_messages(_url(file)), max_tokens=10 + i)
            for i, file in enumerate(files)
        ]
        return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    expected = [_expected(seeing, file, 10 + i)[0] for i, file in enumerate(files)]
    assert seeing.ask(all_of_them) == expected


def _url(file: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()


def _expected(seeing: Served, file: Path, new_tokens: int) -> tuple[str, int]:
    """The answer by the model alone, and the prompt's tokens."""
    encoder = Encoder(seeing.folder, seeing.model.manifest, raw=False)
    inputs = encoder.encode([user_message("the cat", [read_picture(str(file))])])
    tokens = seeing.model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0]
    length = inputs["input_ids"].shape[1]
    return seeing.text(tokens[length:].tolist()), length


@pytest.mark.parametrize(
    ("url", "part"),
    [
        ("https://example.com/a.png", "are not fetched"),
        ("file:///etc/passwd", "are not fetched"),
        ("data:image/png", "no data: URL"),
        ("data:image/png;base64,AAAA", "no picture that can be read"),
    ],
)
def test_no_picture(url: str, part: str, seeing: Served) -> None:
    with pytest.raises(BadRequestError, match=part):
        seeing.ask(lambda c: c.chat.completions.create(model=NAME, messages=_messages(url), max_tokens=2))
