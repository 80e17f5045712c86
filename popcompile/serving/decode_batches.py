"""Continuous batching: the last tokens of all rows that decode go through the decode graph in one call, or in few.

A call reads the weights once for all its rows. The buffers of a batch are as long as its longest row, so rows of
similar lengths share one: those of at most 256 slots, of at most 1,024, of at most 4,096 and so on. A row that outgrows
its batch moves to the next. So the buffers of a batch of n rows are for at most 2 n + 1, and have at most five times as
many slots as the shortest of them has tokens, and 256 more; in the first batch 512.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from popcompile.rope import depends_on_length
from popcompile.runtime.cache import KVCache
from popcompile.runtime.generation import PopForCausalLM
from popcompile.serving.joint_cache import JointCache

#: slots of rows in the first batch, and how many times as many they have in each next one
_SHORTEST, _RATIO = 256, 4


class Row(Protocol):
    """token: its last one, whose keys and values its cache does not have yet."""

    token: int


_Row = TypeVar("_Row", bound=Row)


@dataclass
class _Batch(Generic[_Row]):
    rows: list[_Row]
    cache: KVCache


class DecodeBatches(Generic[_Row]):
    """The rows that decode.

    Each is a batch of its own on a GPU, of whose memory no slices are bound, and where a token's keys depend on the
    longest row of its call.
    """

    def __init__(self, model: PopForCausalLM) -> None:
        self._runtime = model.runtime
        self._shares = model.runtime.provider.on_host and not depends_on_length(model.config)
        #: by the slots of their rows at most
        self._batches: dict[object, _Batch[_Row]] = {}

    def rows(self) -> list[_Row]:
        return [row for batch in self._batches.values() for row in batch.rows]

    def join(self, row: _Row, cache: KVCache, *, is_shared: bool = False) -> None:
        """cache: of this row alone, which is taken over, unless it is_shared: others will begin with it too."""
        key = self._key(row, cache.lengths[0])
        batch = self._batches.get(key)
        if batch is None:
            cache = copy.deepcopy(cache) if is_shared else cache
            self._batches[key] = _Batch([row], JointCache(cache) if self._shares else cache)
        else:
            assert isinstance(batch.cache, JointCache)
            batch.cache.join(cache)
            batch.rows.append(row)

    def leave(self, row: _Row) -> None:
        key, batch = next((key, batch) for key, batch in self._batches.items() if row in batch.rows)
        if len(batch.rows) == 1:
            del self._batches[key]
            return
        index = batch.rows.index(row)
        assert isinstance(batch.cache, JointCache)
        batch.cache.leave(index)
        last = batch.rows.pop()
        if last is not row:
            batch.rows[index] = last

    def step(self) -> list[tuple[_Row, Tensor | Exception]]:
        """Feed every row's token. Of each its next logits [1, vocabulary], or what failed; then the row has left."""
        self._move_outgrown()
        results: list[tuple[_Row, Tensor | Exception]] = []
        for key, batch in list(self._batches.items()):
            try:
                results += zip(batch.rows, self._feed(batch.rows, batch.cache), strict=True)
            except Exception as error:
                del self._batches[key]
                results += self._one_by_one(batch) if len(batch.rows) > 1 else [(batch.rows[0], error)]
        return results

    def _key(self, row: _Row, length: int) -> object:
        """Of the batch for a row whose cache has `length` tokens, and one more after the next step."""
        if not self._shares:
            return row
        slots = _SHORTEST
        while slots <= length:
            slots *= _RATIO
        return slots

    def _move_outgrown(self) -> None:
        for key, batch in list(self._batches.items()):
            lengths = zip(list(batch.rows), batch.cache.lengths, strict=True)
            for row in [row for row, length in lengths if self._key(row, length) != key]:
                cache = batch.cache.row(batch.rows.index(row))
                self.leave(row)
                self.join(row, cache)

    def _feed(self, rows: Sequence[_Row], cache: KVCache) -> Tensor:
        """Logits [rows, 1, vocabulary]."""
        return self._runtime.feed([torch.tensor([row.token]) for row in rows], cache, "decode")

    def _one_by_one(self, batch: _Batch[_Row]) -> Iterator[tuple[_Row, Tensor | Exception]]:
        """The rows of a batch that failed, each by itself, so that only those fail that are the reason; the others join
        a batch again.
        """
        for index, row in enumerate(batch.rows):
            cache = batch.cache.row(index)
            try:
                logits = self._feed([row], cache)[0]
                self.join(row, cache)
            except Exception as error:
                yield row, error
            else:
                yield row, logits
