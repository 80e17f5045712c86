"""Several answers at the same time, as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing
from itertools import islice
from typing import TypeVar

_T = TypeVar("_T")


async def merged(
    streams: Iterable[AsyncGenerator[_T, None]], at_once: int | None = None
) -> AsyncGenerator[tuple[int, _T], None]:
    """What streams yield, as it comes, each with its stream's index.

    at_once: streams that are open at the same time at most; None: all. Each next one begins where one ends, the first
    ones in their order. Where one raises, and once this is closed, all are closed.
    """
    given: asyncio.Queue[tuple[int, _T] | Exception | None] = asyncio.Queue()

    async def forward(index: int, stream: AsyncGenerator[_T, None]) -> None:
        try:
            async with aclosing(stream):
                async for item in stream:
                    given.put_nowait((index, item))
            given.put_nowait(None)
        except Exception as error:
            given.put_nowait(error)

    def begin(count: int | None) -> int:
        begun = [asyncio.create_task(forward(*numbered)) for numbered in islice(waiting, count)]
        for task in begun:
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        return len(begun)

    waiting, tasks = enumerate(streams), set[asyncio.Task[None]]()
    under_way = begin(at_once)
    try:
        while under_way:
            item = await given.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                under_way += begin(1) - 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
