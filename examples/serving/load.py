"""How soon users get tokens from `popcompile serve`, as rows of a batch, with its prefix cache, and prompts in chunks:

    python examples/serving/load.py PACKAGE

Prompts are random tokens. First more and more users at once, whose prompts are short; then one who asks for several
answers to a prompt; then one at a time, whose prompts begin with the same tokens and end with 80 of their own; then
many at once, whose prompts have from 64 to 4,096 tokens and begin alike, encoded whole and in chunks. Needs
"popcompile[serve]".
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

from openai import AsyncOpenAI
from tabulate import tabulate

#: own tokens behind what prompts share: more than a window, which is never shared
OWN = 80
SHARED = (64, 256, 1024, 4096)
SECONDS = 1200
#: tokens that are encoded at a time
CHUNK = 1024
#: users at once with short prompts, or answers to one of them; tokens of these, and of their answers
USERS, SHORT, ANSWER = (1, 4, 16), (16, 100), 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("package", type=Path)
    parser.add_argument("--users", type=int, default=16, help="at once (default 16)")
    parser.add_argument("--new-tokens", type=int, default=32, help="of an answer (default 32)")
    parser.add_argument("--repeats", type=int, default=5, help="prompts that begin alike (default 5)")
    options = parser.parse_args()
    with _serving(options.package, 0, CHUNK) as address:
        short = [asyncio.run(_short_prompts(address, tokens, users)) for tokens in SHORT for users in USERS]
        several = [asyncio.run(_several_answers(address, n)) for n in USERS]
    head = [
        "tokens of a prompt",
        "users",
        "tokens/s",
        "ms between two tokens: median",
        "most",
        "s to the first: median",
        "last",
    ]
    print(tabulate(short, head, tablefmt="github", floatfmt=".1f"), end="\n\n", flush=True)
    head = ["answers to a prompt", "tokens/s", "s in all"]
    print(tabulate(several, head, tablefmt="github", floatfmt=".1f"), end="\n\n", flush=True)
    alone, together = [], []
    for megabytes, chunk in ((0, 0), (0, CHUNK), (512, 0), (512, CHUNK)):
        if chunk:
            with _serving(options.package, megabytes, chunk) as address:
                alone.append(asyncio.run(_one_user(address, options.repeats)))
        with _serving(options.package, megabytes, chunk) as address:
            row = asyncio.run(_many_users(address, options.users, options.new_tokens))
        together.append([f"{megabytes} MB" if megabytes else "none", str(chunk) if chunk else "whole", *row])
    head = ["tokens that prompts share", "ms to the first token, no prefix cache", "with it"]
    print(tabulate(list(zip(SHARED, *alone, strict=True)), head, tablefmt="github"), end="\n\n")
    head = [
        "prefix cache",
        "chunks",
        "s to the first token: median",
        "90%",
        "last",
        "between two",
        "in all",
        "tokens/s",
    ]
    print(tabulate(together, head, tablefmt="github", floatfmt=".1f"))


@contextlib.contextmanager
def _serving(package: Path, megabytes: int, chunk: int) -> Iterator[str]:
    """The address of a server that has answered once: it has opened its files and started its threads."""
    options = ["--port", "0", "--prefix-cache-mb", str(megabytes), "--prefill-chunk", str(chunk)]
    command = [sys.executable, "-m", "popcompile", "serve", str(package), *options, "--served-model-name", "model"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            address = process.stdout.readline().split(" at ")[1].split(";")[0]
            asyncio.run(_warm_up(address))
            yield address
        finally:
            process.terminate()


def _client(address: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=address, api_key="none", max_retries=0, timeout=SECONDS)


async def _warm_up(address: str) -> None:
    async with _client(address) as client:
        await _ask(client, _tokens(256, 0), 4)


def _tokens(count: int, seed: int) -> list[int]:
    return [random.Random(seed * 1_000_003 + i).randrange(1000, 20_000) for i in range(count)]


class Times(NamedTuple):
    """Of a streamed answer: seconds to the first token and between any two, and how many there are."""

    first: float
    gaps: list[float]
    tokens: int


async def _ask(client: AsyncOpenAI, prompt: list[int], new_tokens: int) -> Times:
    started, times, new = time.perf_counter(), list[float](), 0
    stream = await client.completions.create(
        model="model", prompt=prompt, max_tokens=new_tokens, stream=True, stream_options={"include_usage": True}
    )
    async for chunk in stream:
        times.append(time.perf_counter() - started)
        new = chunk.usage.completion_tokens if chunk.usage else new
    return Times(times[0], [after - before for before, after in pairwise(times)], new)


async def _short_prompts(address: str, tokens: int, users: int) -> list[float]:
    """Of users at once with prompts of so many tokens: both, tokens a second of all, milliseconds between two of an
    answer's tokens, median and most, and seconds to the first, the median and the last.
    """
    async with _client(address) as client:
        started = time.perf_counter()
        answers = await asyncio.gather(*(_ask(client, _tokens(tokens, 1000 + i), ANSWER) for i in range(users)))
    total, gaps = time.perf_counter() - started, [gap for answer in answers for gap in answer.gaps]
    firsts, new = [answer.first for answer in answers], sum(answer.tokens for answer in answers)
    between = [1e3 * statistics.median(gaps), 1e3 * max(gaps)]
    return [tokens, users, new / total, *between, statistics.median(firsts), max(firsts)]


async def _several_answers(address: str, n: int) -> list[float]:
    """Of n answers to one short prompt: how many, tokens a second, and seconds to the end of all."""
    async with _client(address) as client:
        started = time.perf_counter()
        whole = await client.completions.create(
            model="model", prompt=_tokens(max(SHORT), 7), max_tokens=ANSWER, n=n, temperature=1
        )
    total = time.perf_counter() - started
    return [n, whole.usage.completion_tokens / total, total]


async def _one_user(address: str, repeats: int) -> list[str]:
    """For each length of what prompts share, milliseconds to the first token of those after the first that begins so:
    median and half the spread.
    """
    rows = []
    async with _client(address) as client:
        for shared in SHARED:
            prompts = [_tokens(shared, shared) + _tokens(OWN, 1 + own) for own in range(repeats + 1)]
            times = [1e3 * (await _ask(client, prompt, 1)).first for prompt in prompts][1:]
            rows.append(f"{statistics.median(times):.0f} ± {(max(times) - min(times)) / 2:.0f}")
    return rows


async def _many_users(address: str, users: int, new_tokens: int) -> list[float]:
    """Of requests at once: seconds to their first tokens, the median, the 9th of 10 and the last, the most between two
    tokens of an answer, and of all of them; and tokens a second.
    """
    lengths = [round(64 * 2 ** (6 * i / max(1, users - 1))) for i in range(users)]
    system = _tokens(1024, 7)
    prompts = [(system[: max(0, n - OWN)] + _tokens(n, 100 + i))[:n] for i, n in enumerate(lengths)]
    async with _client(address) as client:
        started = time.perf_counter()
        answers = await asyncio.gather(*(_ask(client, prompt, new_tokens) for prompt in prompts))
    total, firsts = time.perf_counter() - started, sorted(answer.first for answer in answers)
    gap, new = max(gap for answer in answers for gap in answer.gaps), sum(answer.tokens for answer in answers)
    return [statistics.median(firsts), firsts[int(0.9 * (users - 1))], firsts[-1], gap, total, new / total]


if __name__ == "__main__":
    main()
