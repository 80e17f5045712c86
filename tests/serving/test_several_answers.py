"""Several answers to one request come at the same time, and those to one prompt share what it was encoded to."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from itertools import groupby
from typing import Any

import pytest
from openai import AsyncOpenAI
from served import NAME, Served

from popcompile.errors import PopcompileError
from popcompile.serving import answer
from popcompile.serving.answer import Piece
from popcompile.serving.engine import Engine
from popcompile.serving.sampling import Sampling
from popcompile.serving.text_stream import TextStream
from popcompile.serving.worker import Prompt, Request, Worker

PROMPT, OTHERS = "the cat sat w3 w7 w11 w5", ["w9 w8", "w7 the w7 w1 w30 w31 w32", "w40", "sat w12 w13"]


def _samplings(count: int, new_tokens: int) -> list[Sampling]:
    return [Sampling(new_tokens, temperature=1.0, seed=seed) for seed in range(count)]


def _pieces(
    served: Served, engine: Engine, prompt: str, samplings: Sequence[Sampling]
) -> AsyncGenerator[tuple[int, Piece], None]:
    return engine.generate({"input_ids": served.ids(prompt)}, samplings)


async def _texts(served: Served, engine: Engine, prompt: str, samplings: Sequence[Sampling]) -> list[str]:
    texts = [""] * len(samplings)
    async for index, piece in _pieces(served, engine, prompt, samplings):
        texts[index] += piece.text
    return texts


def _expected(served: Served, prompt: str, samplings: Sequence[Sampling]) -> list[str]:
    settings = [
        {"seed": s.seed, "do_sample": s.temperature is not None, "temperature": s.temperature} for s in samplings
    ]
    return [
        served.text(served.serially(prompt, sampling.new_tokens, **given))
        for sampling, given in zip(samplings, settings, strict=True)
    ]


@pytest.mark.parametrize("places", [16, 4, 3, 1])
@pytest.mark.parametrize("name", ["served", "sliding_served", "longrope_served"])
def test_a_prompt_is_encoded_once(
    name: str, places: int, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever has a place at once, and however rows decode: where they share nothing, from a copy of their own."""
    served = request.getfixturevalue(name)
    samplings = _samplings(4, 15)
    expected = _expected(served, PROMPT, samplings)
    assert len(set(expected)) == 4
    calls = served.note_calls(monkeypatch)
    texts = asyncio.run(_texts(served, served.engine(max_concurrent=places), PROMPT, samplings))
    assert texts == expected
    assert [call for call in calls if max(call) > 1] == [[len(served.ids(PROMPT)[0])]]
    if name != "longrope_served":
        assert max(len(call) for call in calls) == min(places, 4)
        assert places < 4 or len(calls) == 15


def test_a_prompt_of_one_token(served: Served) -> None:
    """Which is encoded as a token is decoded."""
    samplings = _samplings(3, 5)
    assert asyncio.run(_texts(served, served.engine(), "w40", samplings)) == _expected(served, "w40", samplings)


def test_in_chunks_beside_others(served: Served) -> None:
    prompts = [" ".join(f"w{i * k % 60 + 1}" for i in range(60)) for k in (7, 11)]
    samplings, engine = _samplings(3, 10), served.engine(chunk=8)

    async def both() -> list[list[str]]:
        return await asyncio.gather(*(_texts(served, engine, prompt, samplings) for prompt in prompts))

    assert asyncio.run(both()) == [_expected(served, prompt, samplings) for prompt in prompts]


def test_a_lone_prompt_is_encoded_whole(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers are no others, for which a long one would be cut."""
    calls, prompt = served.note_calls(monkeypatch), " ".join(["w5"] * 60)
    asyncio.run(_texts(served, served.engine(chunk=8), prompt, _samplings(3, 2)))
    assert [call for call in calls if max(call) > 1] == [[60]]


# --- memory ----------------------------------------------------------------------------------------------------


def test_what_is_kept(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row of each place, and one prompt more, for those of its answers that wait for one."""
    places, step, seen, kept = 4, Worker.step, set[Prompt](), list[int]()

    def noted(self: Worker, arrived: Sequence[Request]) -> Any:
        seen.update(request.prompt for request in arrived)
        given = step(self, arrived)
        kept.append(sum(prompt.encoded is not None for prompt in seen))
        assert len(self._rows.rows()) <= places
        return given

    monkeypatch.setattr(Worker, "step", noted)
    engine = served.engine(max_concurrent=places)

    async def all_of_them() -> None:
        await asyncio.gather(*(_texts(served, engine, prompt, _samplings(3, 6)) for prompt in (PROMPT, *OTHERS)))

    asyncio.run(all_of_them())
    assert len(seen) == 5 and max(kept) == 1 and kept[-1] == 0


# --- one leaves, one fails -------------------------------------------------------------------------------------


def test_leaving_ends_all(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the one that waits for a place, and whoever waited behind it gets one."""
    expected = served.text(served.serially(OTHERS[0], 20))
    calls, engine = served.note_calls(monkeypatch), served.engine(max_concurrent=3)

    async def leave() -> list[str]:
        async with aclosing(_pieces(served, engine, PROMPT, _samplings(4, 400))) as pieces:
            for _ in range(9):
                await anext(pieces)
            staying = asyncio.ensure_future(_texts(served, engine, OTHERS[0], [Sampling(20)]))
            await asyncio.sleep(0)
        return await staying

    assert asyncio.run(leave()) == [expected]
    rows = [len(call) for call in calls if set(call) == {1}]
    assert max(rows) == 3 and [count for count, _ in groupby(rows)] == [3, 1]
    assert rows.count(1) == 19 and rows.count(3) < 40


class _Fails(TextStream):
    """A text that fails at its third token, where w40 is to stop it."""

    def put(self, token: int) -> str:
        if self._stop == ("w40",) and len(self._ids) == 2:
            raise PopcompileError("no text")
        return super().put(token)


def test_an_error_ends_all(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one request, and not another's."""
    monkeypatch.setattr(answer, "TextStream", _Fails)
    engine, samplings = served.engine(), [Sampling(400), Sampling(400, stop=("w40",)), Sampling(400)]

    async def both() -> list[Any]:
        work = (_texts(served, engine, PROMPT, samplings), _texts(served, engine, OTHERS[0], [Sampling(20)]))
        return await asyncio.gather(*work, return_exceptions=True)

    expected = served.text(served.serially(OTHERS[0], 20))
    calls = served.note_calls(monkeypatch)
    error, texts = asyncio.run(both())
    assert isinstance(error, PopcompileError) and texts == [expected]
    assert {len(call) for call in calls[-15:]} == {1} and len(calls) < 60


# --- over HTTP -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("chat", [True, False])
def test_streamed(served: Served, chat: bool) -> None:
    """Chunks say which choice they are of, those of one are between those of others, and the usage is that of all."""
    settings: dict[str, Any] = {"model": NAME, "n": 3, "seed": 5, "temperature": 1.0, "max_tokens": 9}

    def asked(client: AsyncOpenAI, **more: Any) -> Any:
        if chat:
            messages: Any = [{"role": "user", "content": PROMPT}]
            return client.chat.completions.create(messages=messages, **settings, **more)
        return client.completions.create(prompt=PROMPT, **settings, **more)

    async def stream(client: AsyncOpenAI) -> list[Any]:
        return [chunk async for chunk in await asked(client, stream=True, stream_options={"include_usage": True})]

    *chunks, last = served.ask(stream)
    whole = served.ask(asked)
    choices = [chunk.choices[0] for chunk in chunks]
    order = [choice.index for choice in choices]
    assert order != sorted(order)
    for index, expected in enumerate(whole.choices):
        own = [choice for choice in choices if choice.index == index]
        text = "".join((c.delta.content if chat else c.text) or "" for c in own)
        assert text == (expected.message.content if chat else expected.text)
        assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + [expected.finish_reason]
        assert not chat or [c.delta.role for c in own] == ["assistant"] + [None] * (len(own) - 1)
    assert not last.choices and last.usage.prompt_tokens == 7
    assert last.usage.total_tokens == whole.usage.total_tokens
    assert last.usage.completion_tokens == sum(
        len(served.serially(PROMPT, 9, seed=s, do_sample=True)) for s in (5, 6, 7)
    )


def test_prompts_of_a_list_at_once(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [PROMPT, *OTHERS]
    expected = [served.text(served.serially(prompt, 10)) for prompt in prompts]
    calls = served.note_calls(monkeypatch)
    answer = served.ask(lambda c: c.completions.create(model=NAME, prompt=prompts, max_tokens=10, temperature=0))
    assert [choice.text for choice in answer.choices] == expected
    assert [len(call) for call in calls] == [1] * 5 + [5] * 9


def test_a_long_list_lets_others_in(served: Served) -> None:
    """Who comes later gets a place as soon as one is free, and not behind all prompts of the list."""
    engine, order = served.engine(max_concurrent=2), list[str]()

    async def ask(client: AsyncOpenAI) -> None:
        async def one(name: str, prompt: str | list[str]) -> None:
            await client.completions.create(model=NAME, prompt=prompt, max_tokens=8, temperature=0, n=2)
            order.append(name)

        listed = asyncio.ensure_future(one("list", [PROMPT] * 12))
        while not engine.scheduler._under_way:
            await asyncio.sleep(0)
        await asyncio.gather(listed, one("other", PROMPT))

    served.ask(ask, engine)
    assert order == ["other", "list"]
