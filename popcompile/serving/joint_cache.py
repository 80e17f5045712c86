"""The caches of rows that decode together, in buffers that rows join and leave at little cost."""

from __future__ import annotations

from popcompile.runtime.cache import KVCache, to_torch, with_room


class JointCache(KVCache):
    """Keys and values of several rows on the host, in buffers [capacity, kv_heads, slots, head_size].

    `values` are the buffers' first rows, as many as there are: a slice of the first dimension, so that graphs write in
    place. A row that joins is copied once; one that leaves gives its place to the last, whose tokens are copied. The
    capacity is at most twice the number of rows and one more. What is not used is allocated, and not touched.
    """

    def __init__(self, first: KVCache) -> None:
        """first: of one row, whose memory is taken over."""
        super().__init__(first.values, list(first.lengths), first.device, list(first.deltas))
        self._buffers = [to_torch(value) for value in first.values]

    @property
    def capacity(self) -> int:
        """Rows that the buffers have room for."""
        return self._buffers[0].shape[0]

    def join(self, row: KVCache) -> None:
        """Append a copy of another cache's only row."""
        rows, (length,) = len(self.lengths), row.lengths
        capacity = self.capacity if rows < self.capacity else rows + rows // 2 + 1
        slots = self.slots if length < self.slots else with_room(length)
        if (capacity, slots) != (self.capacity, self.slots):
            self._resize(capacity, slots)
        for buffer, tensor in zip(self._buffers, row.tensors(), strict=True):
            buffer[rows, :, :length] = tensor[0]
        self.lengths, self.deltas = self.lengths + row.lengths, self.deltas + row.deltas
        self._bind()

    def leave(self, index: int) -> None:
        """Forget a row, whose place the last one takes."""
        *lengths, length = self.lengths
        *deltas, delta = self.deltas
        last = len(lengths)
        if index < last:
            lengths[index], deltas[index] = length, delta
            for buffer in self._buffers:
                buffer[index, :, :length] = buffer[last, :, :length]
        self.lengths, self.deltas = lengths, deltas
        if self.capacity > 2 * last + 1:
            self._resize(last + last // 2 + 1, self.slots)
        self._bind()

    def reserve(self, slots: int) -> None:
        if slots > self.slots:
            self._resize(self.capacity, with_room(slots))
            self._bind()

    def _resize(self, capacity: int, slots: int) -> None:
        """Other buffers with the same tokens; both are there while these are copied."""
        resized = []
        for buffer in self._buffers:
            _, kv_heads, _, head_size = buffer.shape
            other = buffer.new_empty((capacity, kv_heads, slots, head_size))
            for row, length in enumerate(self.lengths):
                other[row, :, :length] = buffer[row, :, :length]
            resized.append(other)
        self._buffers = resized

    def _bind(self) -> None:
        """The buffers' first rows as what graphs are given."""
        self.replace([buffer[: len(self.lengths)] for buffer in self._buffers])
