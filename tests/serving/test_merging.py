"""Several streams as one: everything of each comes, in its order, and all are closed together."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from itertools import count

import pytest

from popcompile.serving.merging import merged


class Streams:
    """Streams that count, and which of them are open."""

    def __init__(self) -> None:
        self.open: set[str] = set()
        self.most = 0

    async def of(self, name: str, end: int | None, fails: bool = False) -> AsyncGenerator[str, None]:
        self.open.add(name)
        self.most = max(self.most, len(self.open))
        try:
            for i in count():
                await asyncio.sleep(0)
                if i == end:
                    break
                yield f"{name}{i}"
            if fails:
                raise ValueError(name)
        finally:
            self.open.discard(name)


@pytest.mark.parametrize("at_once", [None, 1, 2, 9])
def test_all_of_each(at_once: int | None) -> None:
    streams = Streams()

    async def run() -> list[tuple[int, str]]:
        each = (streams.of(name, end) for name, end in zip("abcd", (3, 0, 9, 9), strict=True))
        return [item async for item in merged(each, at_once)]

    items = asyncio.run(run())
    for index, end in enumerate((3, 0, 9, 9)):
        assert [text for i, text in items if i == index] == [f"{'abcd'[index]}{k}" for k in range(end)]
    assert streams.most == min(at_once or 4, 4) and not streams.open
    assert (items == sorted(items)) == (at_once == 1)


def test_of_none() -> None:
    async def run() -> list[tuple[int, str]]:
        return [item async for item in merged(list[AsyncGenerator[str, None]]())]

    assert asyncio.run(run()) == []


def test_an_error_closes_all() -> None:
    streams = Streams()

    async def run() -> None:
        async for _ in merged([streams.of("a", None), streams.of("b", 3, fails=True)]):
            pass

    with pytest.raises(ValueError, match="b"):
        asyncio.run(run())
    assert streams.most == 2 and not streams.open


def test_closing_closes_all() -> None:
    streams = Streams()

    async def run() -> None:
        async with aclosing(merged((streams.of(name, None) for name in "abc"), 2)) as items:
            for _ in range(5):
                await anext(items)
            assert streams.open == {"a", "b"}
        assert not streams.open and streams.most == 2

    asyncio.run(run())
