"""Requests at the same time: they decode as rows of one batch, between chunks of prompts, and end one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing
from itertools import pairwise
from typing import Any

import pytest
import torch
from served import Served

from popcompile.errors import PopcompileError
from popcompile.serving import answer, worker
from popcompile.serving.engine import Engine
from popcompile.serving.errors import ApiError
from popcompile.serving.prefilling import Encoded, Prefiller
from popcompile.serving.sampling import Sampling
from popcompile.serving.text_stream import TextStream
from popcompile.serving.worker import Worker

PROMPTS = ["the cat sat w3", "w9 w8", "w7 the w7 w1 w30 w31 w32", "w40", "sat w12 w13"]


@pytest.fixture
def calls(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """See `Served.note_calls`."""
    return served.note_calls(monkeypatch)


def _inputs(served: Served, prompt: str | list[int]) -> dict[str, torch.Tensor]:
    return {"input_ids": served.ids(prompt)}


async def _text(served: Served, engine: Engine, prompt: str, new_tokens: int) -> str:
    pieces = engine.generate(_inputs(served, prompt), [Sampling(new_tokens)])
    return "".join([piece.text async for _, piece in pieces])


def _expected(served: Served, prompt: str, new_tokens: int) -> str:
    return served.text(served.serially(prompt, new_tokens))


def _together(*work: Awaitable[Any]) -> list[Any]:
    """What each returns or raises."""

    async def run() -> list[Any]:
        return await asyncio.gather(*work, return_exceptions=True)

    return asyncio.run(run())


def test_one_call_for_all(served: Served, calls: list[list[int]]) -> None:
    """From when all prompts are encoded, short as they are, to the end of the shortest answer, and fewer rows then."""
    engine = served.engine()
    texts = _together(*(_text(served, engine, prompt, 10 + 2 * i) for i, prompt in enumerate(PROMPTS)))
    decoding = [len(call) for call in calls[len(PROMPTS) :]]
    assert texts == [_expected(served, prompt, 10 + 2 * i) for i, prompt in enumerate(PROMPTS)]
    assert decoding == [5] * 9 + [4] * 2 + [3] * 2 + [2] * 2 + [1] * 2


def test_streams_wait_for_a_chunk(served: Served, calls: list[list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for one of every prompt: a token is decoded between any two, once there are rows."""
    monkeypatch.setattr(worker, "_SHORT", 60)
    engine = served.engine(chunk=8)
    long = [torch.randint(5, 60, (60,), generator=torch.Generator().manual_seed(i)).tolist() for i in range(3)]

    async def stream() -> None:
        async with aclosing(engine.generate(_inputs(served, PROMPTS[0]), [Sampling(200)])) as pieces:
            await anext(pieces)
            begun = len(calls)
            others = [engine.generate(_inputs(served, ids), [Sampling(1)]) for ids in long]
            waiting = [asyncio.ensure_future(anext(other)) for other in others]
            while not all(each.done() for each in waiting):
                await anext(pieces)
            is_chunk = [max(call) > 1 for call in calls[begun:]]
            assert is_chunk.count(True) == 21
            assert not any(one and other for one, other in pairwise(is_chunk))

    asyncio.run(stream())


def test_a_client_that_leaves(served: Served, calls: list[list[int]]) -> None:
    """Its row is gone from the next call on, and the others go on with their own."""
    engine = served.engine()

    async def leave(prompt: str) -> None:
        async with aclosing(engine.generate(_inputs(served, prompt), [Sampling(300)])) as pieces:
            for _ in range(6):
                await anext(pieces)

    staying = [PROMPTS[i] for i in (0, 1, 3)]
    _, *texts = _together(leave(PROMPTS[2]), *(_text(served, engine, prompt, 40) for prompt in staying))
    assert texts == [_expected(served, prompt, 40) for prompt in staying]
    rows = [len(call) for call in calls if set(call) == {1}]
    assert 1 <= rows.count(4) <= 8 and rows.count(3) > 20


def test_no_prompt_is_encoded_for_who_left(served: Served, calls: list[list[int]]) -> None:
    engine = served.engine(chunk=8)

    async def all_of_them() -> list[str]:
        streams = [asyncio.ensure_future(_text(served, engine, prompt, 50)) for prompt in PROMPTS[:2]]
        leaving = asyncio.ensure_future(anext(engine.generate(_inputs(served, [7] * 200), [Sampling(1)])))
        while sum(max(call) > 1 for call in calls) < 4:
            await asyncio.sleep(0)
        leaving.cancel()
        return await asyncio.gather(*streams)

    assert asyncio.run(all_of_them()) == [_expected(served, prompt, 50) for prompt in PROMPTS[:2]]
    assert sum(max(call) > 1 for call in calls) < 10


class _Fails(TextStream):
    """A text that fails at its third token, where w40 is to stop it."""

    def put(self, token: int) -> str:
        if self._stop == ("w40",) and len(self._ids) == 2:
            raise PopcompileError("no text")
        return super().put(token)


def _refused() -> Iterator[Encoded | None]:
    yield None
    raise ApiError(400, "no prompt")


@pytest.mark.parametrize("failing", range(3))
def test_an_error_ends_one(served: Served, failing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a chunk of a prompt, and at the first and the third token of an answer."""
    monkeypatch.setattr(answer, "TextStream", _Fails)
    engine, good = served.engine(), Prefiller(served.model).steps(_inputs(served, PROMPTS[2]))

    async def fail(encoding: Iterator[Encoded | None], *stop: Any) -> None:
        async for _ in engine.scheduler.answers(encoding, [Sampling(20, stop=stop)]):
            pass

    encoding, *stop = ((_refused(),), (good, None), (good, "w40"))[failing]
    *texts, error = _together(*(_text(served, engine, prompt, 20) for prompt in PROMPTS[:2]), fail(encoding, *stop))
    assert texts == [_expected(served, prompt, 20) for prompt in PROMPTS[:2]]
    assert isinstance(error, (ApiError, TypeError, PopcompileError)[failing])


def test_end(served: Served) -> None:
    """Whoever is answered or waits for a place is told, and whoever comes later."""
    engine = served.engine(max_concurrent=2)

    async def end() -> list[Any]:
        work = [asyncio.ensure_future(_text(served, engine, prompt, 400)) for prompt in PROMPTS]
        await asyncio.sleep(0.1)
        engine.scheduler.end()
        return await asyncio.gather(*work, _text(served, engine, PROMPTS[0], 1), return_exceptions=True)

    errors = asyncio.run(end())
    assert len(errors) == 6 and all(isinstance(error, ApiError) and error.status_code == 503 for error in errors)


def test_a_worker_that_fails(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a mistake of ours: nobody waits for ever, and the next requests get another."""
    engine = served.engine()
    step: Callable[..., Any] = Worker.step
    left = 3

    def fails(self: Worker, arrived: Any) -> Any:
        nonlocal left
        left -= 1
        return step(self, arrived) if left else 1 / 0

    monkeypatch.setattr(Worker, "step", fails)
    errors = _together(*(_text(served, engine, prompt, 20) for prompt in PROMPTS))
    assert [type(error) for error in errors] == [ZeroDivisionError] * 5
    assert _together(_text(served, engine, PROMPTS[0], 20)) == [_expected(served, PROMPTS[0], 20)]
