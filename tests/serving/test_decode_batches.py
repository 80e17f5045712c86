"""Rows that decode in one batch get the logits that each gets alone, whoever joins, leaves or fails beside them."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import pytest
import torch
from served import Served
from torch import Tensor

from popcompile.errors import PopcompileError
from popcompile.runtime.cache import KVCache
from popcompile.runtime.generation import PopForCausalLM
from popcompile.serving.decode_batches import DecodeBatches
from popcompile.serving.joint_cache import JointCache

#: tokens that a row is decoded for at most
STEPS = 24


@dataclass(eq=False)
class Row:
    """expected: the row's next logits [1, vocabulary] at every step, decoded alone, and the cache before the first."""

    token: int
    cache: KVCache
    expected: list[Tensor] = field(default_factory=list)
    steps: int = 0

    @classmethod
    def of(cls, model: PopForCausalLM, ids: Tensor) -> Row:
        """A prompt ids [tokens], and what follows it greedily."""
        alone, cache = model.runtime.new_cache(1), model.runtime.new_cache(1)
        for each in (alone, cache):
            logits = model.runtime.feed([ids], each, "prefill")
        row = cls(int(logits.argmax()), cache)
        token = row.token
        for _ in range(STEPS):
            row.expected.append(model.runtime.feed([torch.tensor([token])], alone, "decode")[0])
            token = int(row.expected[-1].argmax())
        return row

    def check(self, logits: Tensor | Exception) -> None:
        assert isinstance(logits, Tensor), logits
        torch.testing.assert_close(logits, self.expected[self.steps], atol=1e-4, rtol=1e-4)  # products of other sizes
        self.token = int(self.expected[self.steps].argmax())
        self.steps += 1


def _rows(model: PopForCausalLM, lengths: list[int]) -> list[Row]:
    numbers = torch.Generator().manual_seed(0)
    return [Row.of(model, torch.randint(5, 60, (length,), generator=numbers)) for length in lengths]


@pytest.fixture(scope="module", params=["served", "sliding_served", "longrope_served"])
def model(request: pytest.FixtureRequest) -> PopForCausalLM:
    return request.getfixturevalue(request.param).model


@pytest.mark.parametrize("seed", range(3))
def test_joining_and_leaving(model: PopForCausalLM, seed: int) -> None:
    """Rows of unlike lengths, some of which outgrow their batch, come and go at any step."""
    drawn, batches = random.Random(seed), DecodeBatches[Row](model)
    waiting = _rows(model, [3, 250, 9, 40, 255, 12, 14, 245, 300, 5])
    drawn.shuffle(waiting)
    batches.join(row := waiting.pop(), row.cache)
    while waiting or batches.rows():
        for row, logits in batches.step():
            row.check(logits)
        for row in batches.rows():
            if row.steps == STEPS or drawn.random() < 0.05:
                batches.leave(row)
        while waiting and (drawn.random() < 0.4 or not batches.rows()):
            batches.join(row := waiting.pop(), row.cache)


def test_calls(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sixteen rows of similar lengths one call a step, and of all that grow beyond 256 another one."""
    calls: list[int] = []
    feed = served.model.runtime.feed
    monkeypatch.setattr(served.model.runtime, "feed", lambda rows, *rest: calls.append(len(rows)) or feed(rows, *rest))
    batches = DecodeBatches[Row](served.model)
    rows = _rows(served.model, [10 + i for i in range(14)] + [252, 253])
    calls.clear()
    for row in rows:
        batches.join(row, row.cache)
    for _ in range(6):
        for row, logits in batches.step():
            row.check(logits)
    assert calls == [16, 16, 16, 15, 1, 14, 2, 14, 2]


@pytest.mark.parametrize("wrong", [0, 2, 3])
def test_an_error_is_of_one_row(served: Served, wrong: int) -> None:
    """A token that the graph refuses; the others go on, in a batch again."""
    batches = DecodeBatches[Row](served.model)
    rows = _rows(served.model, [10, 30, 20, 40])
    for row in rows:
        batches.join(row, row.cache)
    for row, logits in batches.step():
        row.check(logits)
    rows[wrong].token = served.model.manifest.vocab_size
    results = dict(batches.step())
    assert isinstance(results.pop(rows[wrong]), PopcompileError)
    for row, logits in results.items():
        row.check(logits)
    for _ in range(2):
        for row, logits in batches.step():
            row.check(logits)
    assert {row: row.steps for row in batches.rows()} == {row: 4 for row in rows if row is not rows[wrong]}


def test_an_error_of_the_only_row(served: Served) -> None:
    batches = DecodeBatches[Row](served.model)
    (row,) = _rows(served.model, [10])
    batches.join(row, row.cache)
    row.token = served.model.manifest.vocab_size
    ((failed, error),) = batches.step()
    assert failed is row and isinstance(error, PopcompileError) and not batches.rows()


# --- memory ----------------------------------------------------------------------------------------------------


def _empty(length: int) -> Row:
    """A row that only takes room."""
    cache = KVCache.unpacked(torch.zeros(2, 1, length, 1), "cpu")
    return Row(0, cache)


def _buffers(batches: DecodeBatches[Row]) -> dict[object, tuple[int, int, list[int]]]:
    """Of each batch the rows and slots that it has room for, and the rows' tokens."""
    found = {}
    for key, batch in batches._batches.items():
        assert isinstance(batch.cache, JointCache)
        found[key] = (batch.cache.capacity, batch.cache.slots, batch.cache.lengths)
    return found


def test_bound(served: Served) -> None:
    """That of the module's docstring, whoever comes and goes."""
    drawn, batches = random.Random(1), DecodeBatches[Row](served.model)
    for _ in range(300):
        rows = batches.rows()
        if rows and drawn.random() < (0.4 if len(rows) < 16 else 0.9):
            batches.leave(drawn.choice(rows))
        else:
            row = _empty(round(2 ** drawn.uniform(3, 14)))
            batches.join(row, row.cache)
        for key, (capacity, slots, lengths) in _buffers(batches).items():
            assert capacity <= 2 * len(lengths) + 1
            assert max(lengths) < slots <= (512 if key == 256 else 5 * min(lengths) + 256)


def test_a_long_row_beside_short_ones(served: Served) -> None:
    batches = DecodeBatches[Row](served.model)
    for length in (100, 100, 4096, *[100] * 13):
        row = _empty(length)
        batches.join(row, row.cache)
    room = sum(capacity * slots for capacity, slots, _ in _buffers(batches).values())
    assert room < 20_000 < 16 * 4096
