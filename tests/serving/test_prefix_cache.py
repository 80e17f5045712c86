"""Prompts that begin alike share keys and values, within a bound, and their answers are what they were without."""

from __future__ import annotations

import asyncio
import pickle
from itertools import zip_longest
from typing import Any

import pytest
import torch
from conftest import tiny_gemma3, tiny_llama
from openai import AsyncOpenAI
from openai.types import Completion
from served import WINDOW, Served
from torch import Tensor

from popcompile.rope import depends_on_length
from popcompile.runtime.cache import KVCache, to_ort
from popcompile.serving.answer import Piece
from popcompile.serving.prefilling import Encoded, Prefiller
from popcompile.serving.prefix_cache import PrefixCache
from popcompile.serving.sampling import Sampling
from popcompile.serving.scheduler import Scheduler

#: tokens of a block, and bytes of one of `kv`: keys and values of one layer, one head of one number in fp32
BLOCK, BYTES = 4, 2 * 4 * 4


def kv(ids: list[int]) -> KVCache:
    """A cache whose keys are the tokens."""
    values = torch.tensor(ids, dtype=torch.float32)[None, None, :, None]
    return KVCache([to_ort(values.clone()), to_ort(-values)], [len(ids)])


def held(cache: PrefixCache, ids: list[int]) -> list[int]:
    found = cache.find(ids)
    if found is None:
        return []
    assert torch.equal(found[0], -found[1])
    return found[0, 0, :, 0].int().tolist()


def test_whole_blocks_of_the_longest_beginning() -> None:
    cache = PrefixCache(100 * BYTES, BLOCK)
    first = list(range(11))
    cache.store(first, kv(first))
    assert held(cache, first) == first[:8]
    assert held(cache, [*first[:6], 99, 98, 97]) == first[:4]
    assert held(cache, first[:3]) == held(cache, [9, *first]) == held(cache, []) == []
    cache.store([*first[:4], 50, 51, 52, 53], kv([*first[:4], 50, 51, 52, 53]))
    assert cache.bytes == 3 * BYTES, "the block that both begin with is there once"


def test_bound() -> None:
    """The least recently used blocks go first, and of a prompt its last ones."""
    cache = PrefixCache(3 * BYTES, BLOCK)
    a, b, c = ([100 * n + i for i in range(8)] for n in range(3))
    cache.store(a, kv(a))
    cache.store(b, kv(b))
    assert (held(cache, a), held(cache, b), cache.bytes) == (a[:4], b, 3 * BYTES)
    held(cache, a)
    cache.store(c[:4], kv(c[:4]))
    assert (held(cache, b), held(cache, a), held(cache, c)) == (b[:4], a[:4], c[:4])
    long = list(range(1000, 1032))
    cache.store(long, kv(long))
    assert held(cache, long) == long[:12] and cache.bytes == 3 * BYTES
    assert held(cache, a) == held(cache, b) == held(cache, c) == []
    nothing = PrefixCache(BYTES - 1, BLOCK)
    nothing.store(a, kv(a))
    assert held(nothing, a) == [] and nothing.bytes == 0


# --- with models -----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["served", "sliding_served"])
def any_served(request: pytest.FixtureRequest) -> Served:
    return request.getfixturevalue(request.param)


def _answer(served: Served, ids: list[int], prefixes: PrefixCache | None, **settings: Any) -> list[Piece]:
    async def run() -> list[Piece]:
        inputs = {"input_ids": torch.tensor([ids])}
        engine = served.engine(prefixes=prefixes)
        return [piece async for _, piece in engine.generate(inputs, [Sampling(new_tokens=8, **settings)])]

    return asyncio.run(run())


def _prompts() -> list[list[int]]:
    """Of 70 to 90 tokens, of which the first 40 are the same, and one that is the beginning of another."""
    random = torch.Generator().manual_seed(3)
    system = torch.randint(5, 60, (40,), generator=random).tolist()
    turns = [torch.randint(5, 60, (30 + 10 * i,), generator=random).tolist() for i in range(3)]
    prompts = [system + turn for turn in turns]
    return [*prompts, prompts[0][:50], prompts[0]]


def test_answers_are_the_same(any_served: Served) -> None:
    """What is reused of the last prompt, which comes again, ends before its window, and of one that is the beginning of
    another before its own.
    """
    prefixes, cached = PrefixCache(1 << 24, BLOCK), []
    for ids in _prompts():
        plain, reused = _answer(any_served, ids, None), _answer(any_served, ids, prefixes)
        assert [p.text for p in plain] == [p.text for p in reused]
        sampled = [_answer(any_served, ids, p, temperature=1.0, seed=2) for p in (None, prefixes)]
        assert [p.text for p in sampled[0]] == [p.text for p in sampled[1]]
        cached.append(reused[0].cached)
        assert plain[0].cached == 0 and sampled[1][0].cached == (len(ids) - WINDOW) // BLOCK * BLOCK
    assert cached == [0, 40, 40, (50 - WINDOW) // BLOCK * BLOCK, (70 - WINDOW) // BLOCK * BLOCK]


def test_keys_and_values_are_the_same(any_served: Served) -> None:
    """Of a prompt that goes on where another one had its window: of every token, and the logits behind it."""
    first, second = _prompts()[3], _prompts()[0]
    model = any_served.model
    logits: list[Tensor] = []
    caches: list[KVCache] = []
    for prompts in ([second], [first, second]):
        kept = PrefixCache(1 << 24, BLOCK)
        for ids in prompts:
            begun = kept.find(ids[: len(ids) - WINDOW])
            cache = model.runtime.new_cache(1) if begun is None else KVCache.unpacked(begun, "cpu")
            logits.append(model.runtime.feed([torch.tensor(ids[cache.lengths[0] :])], cache, "prefill"))
            kept.store(ids[: len(ids) - WINDOW], cache)
            caches.append(cache)
    torch.testing.assert_close(logits[0], logits[-1], atol=1e-4, rtol=1e-4)  # other sizes of products, other rounding
    for plain, reused in zip(caches[0].tensors(), caches[-1].tensors(), strict=True):
        torch.testing.assert_close(plain, reused, atol=1e-4, rtol=1e-4)


def test_a_window_is_not_reused(served: Served) -> None:
    """The reason for the rule: what the first prompt's window has in the pruned layer's place, above it, differs."""
    first, second = _prompts()[3], _prompts()[0]
    model = served.model
    cache = model.runtime.new_cache(1)
    model.runtime.feed([torch.tensor(first)], cache, "prefill")
    wrong = KVCache.unpacked(cache.packed(0, len(first)), "cpu")
    right = model.runtime.new_cache(1)
    model.runtime.feed([torch.tensor(second)], right, "prefill")
    model.runtime.feed([torch.tensor(second[len(first) :])], wrong, "prefill")
    worst = max(float((a - b).abs().max()) for a, b in zip(wrong.tensors(), right.tensors(), strict=True))
    assert worst > 1e-2


def test_hits_are_counted(served: Served) -> None:
    """In what a client is told, and once for each prompt, however many answers it gets."""
    engine = served.engine(prefixes=PrefixCache(1 << 24, BLOCK))
    prompt = _prompts()[0]

    def ask(n: int) -> Completion:
        return served.ask(
            lambda c: c.completions.create(model="tiny", prompt=prompt, max_tokens=2, n=n, temperature=1), engine
        )

    for n, cached in ((1, 0), (1, 64), (3, 64)):
        usage = ask(n).usage
        assert usage is not None and usage.prompt_tokens_details is not None
        assert (usage.prompt_tokens, usage.prompt_tokens_details.cached_tokens) == (70, cached)


def test_prompts_that_came_together_share(served: Served) -> None:
    """The first to be encoded is held before the second is."""
    engine = served.engine(prefixes=PrefixCache(1 << 24, BLOCK))
    first, second = _prompts()[:2]

    async def both(client: AsyncOpenAI) -> list[int]:
        asked = [client.completions.create(model="tiny", prompt=p, max_tokens=4) for p in (first, second)]
        answers = await asyncio.gather(*asked)
        return [a.usage.prompt_tokens_details.cached_tokens for a in answers]

    assert served.ask(both, engine) == [0, 40]


def test_an_encoded_prompt_travels(served: Served) -> None:
    """As arrays that nobody may write to, as they come out of a store that processes share."""
    ids = torch.tensor([_prompts()[0]])
    encoded = Prefiller(served.model).encode({"input_ids": ids})
    packed = pickle.loads(pickle.dumps(encoded.packed()))
    for array in (packed.prompt, packed.logits, packed.values):
        array.flags.writeable = False
    kept = packed.values.copy()

    async def answer(encoded: Encoded) -> list[Piece]:
        scheduler = Scheduler(served.model, served.tokenizer, max_concurrent=1)
        return [piece async for _, piece in scheduler.answers(iter([encoded]), [Sampling(new_tokens=8)])]

    pieces = asyncio.run(answer(packed.unpacked(served.model)))
    assert [p.text for p in pieces] == [p.text for p in _answer(served, ids[0].tolist(), None)]
    assert (packed.values == kept).all()


# --- in chunks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("chunk", "steps"), [(1, 66), (7, 9), (40, 2), (45, 1), (0, 1)])
def test_chunks_make_the_same(any_served: Served, chunk: int, steps: int) -> None:
    """Logits, and keys and values of every token, those of the window among them."""
    ids = {"input_ids": torch.tensor([_prompts()[0]])}
    *nothing, encoded = Prefiller(any_served.model, chunk=chunk).steps(ids)
    assert nothing == [None] * (steps - 1) and encoded is not None
    assert len(list(Prefiller(any_served.model, chunk=chunk).steps(ids, lambda: False))) == 1
    expected = Prefiller(any_served.model).encode(ids)
    torch.testing.assert_close(encoded.logits, expected.logits, atol=1e-4, rtol=1e-4)
    assert encoded.cache.get_seq_length() == len(ids["input_ids"][0])
    for ours, theirs in zip(encoded.cache.kv.tensors(), expected.cache.kv.tensors(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_chunks_of_prompts_that_came_together(served: Served) -> None:
    """Each goes on from what the other has encoded of what they have in common, 40 tokens."""
    prefiller = Prefiller(served.model, PrefixCache(1 << 24, BLOCK), chunk=8)
    one, other = (prefiller.steps({"input_ids": torch.tensor([ids])}) for ids in _prompts()[:2])
    encoded = [step for pair in zip_longest(one, other) for step in pair if step is not None]
    assert sum(each.cached for each in encoded) == 40
    assert min(each.cached for each in encoded) > 0
    for each, ids in zip(encoded, _prompts(), strict=False):
        expected = Prefiller(served.model).encode({"input_ids": torch.tensor([ids])})
        torch.testing.assert_close(each.logits, expected.logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("chunk", "between"), [(0, 1), (8, 7)])
def test_a_stream_goes_on_between_chunks(served: Served, chunk: int, between: int) -> None:
    engine, seen = served.engine(chunk=chunk), list[str]()

    async def stream(name: str, ids: list[int], started: asyncio.Event) -> None:
        inputs = {"input_ids": torch.tensor([ids])}
        async for _ in engine.generate(inputs, [Sampling(new_tokens=40)]):
            started.set()
            seen.append(name)

    async def both() -> None:
        started = asyncio.Event()
        short = asyncio.ensure_future(stream("short", _prompts()[0][:5], started))
        await started.wait()
        before = len(seen)
        await asyncio.gather(short, stream("long", _prompts()[0], asyncio.Event()))
        assert seen[before:].index("long") in range(between, between + 3)
        assert not engine.scheduler.are_shared()

    asyncio.run(both())


def test_longrope_does_not_share() -> None:
    """Its frequencies are those of the whole prompt's length."""
    scaling = {"rope_type": "longrope", "long_factor": [2.0] * 8, "short_factor": [1.0] * 8, "rope_theta": 10000.0,
               "original_max_position_embeddings": 16}  # fmt: skip
    assert depends_on_length(tiny_llama(rope_parameters=scaling, max_position_embeddings=64))
    assert not depends_on_length(tiny_llama()) and not depends_on_length(tiny_gemma3())
