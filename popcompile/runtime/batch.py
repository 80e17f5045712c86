"""New tokens on their way to a graph: rows of unequal length, padded on the right, by the names of its inputs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Place:
    """Where an image, or a frame of a video, is among the new tokens of a row, and its size in tokens."""

    begin: int
    rows: int
    columns: int

    @property
    def end(self) -> int:
        return self.begin + self.rows * self.columns


@dataclass(frozen=True)
class Batch:
    """values: [B, S, ...] each, by the graphs' names. counts: tokens of every row, S at most. places: of the images in
    every row, if there are any.
    """

    values: dict[str, Tensor]
    counts: list[int]
    places: Sequence[Sequence[Place]] = ()

    @property
    def longest(self) -> int:
        return max(self.counts)

    def row(self, index: int) -> Batch:
        """One row, without pads."""
        count = self.counts[index]
        values = {name: v[index : index + 1, :count] for name, v in self.values.items()}
        return Batch(values, [count], self.places[index : index + 1])

    def split(self, size: int) -> Iterator[Batch]:
        """A single row in pieces of so many tokens, or of more, where an image would be cut: its tokens may see one
        another.
        """
        begin, (count,) = 0, self.counts
        while begin < count:
            end = min(begin + size, count)
            for place in self.places[0] if self.places else ():
                end = place.end if place.begin <= end < place.end else end
            yield Batch({name: v[:, begin:end] for name, v in self.values.items()}, [end - begin])
            begin = end
