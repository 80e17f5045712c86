"""New tokens on their way to a graph: rows of unequal length, padded on the right, by the names of its inputs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """values: [B, S, ...] each, by the graphs' names. counts: tokens of every row, S at most."""

    values: dict[str, Tensor]
    counts: list[int]

    @property
    def longest(self) -> int:
        return max(self.counts)

    def row(self, index: int) -> Batch:
        """One row, without pads."""
        count = self.counts[index]
        return Batch({name: v[index : index + 1, :count] for name, v in self.values.items()}, [count])

    def split(self, size: int) -> Iterator[Batch]:
        """A single row in pieces of at most so many tokens."""
        for begin in range(0, self.counts[0], size):
            count = min(size, self.counts[0] - begin)
            yield Batch({name: v[:, begin : begin + count] for name, v in self.values.items()}, [count])
