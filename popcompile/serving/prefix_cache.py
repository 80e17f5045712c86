"""Keys and values of prompts' beginnings, for prompts that begin alike: system prompts, documents, earlier turns.

Tokens are kept in blocks, each under a hash of all tokens up to its end, so that prompts share the blocks that they
have in common, and the least recently used go first. Kept are context tokens alone, whose keys and values are the same
in any prompt that begins so: the last ones, the window, take every layer, and another prompt's window is elsewhere.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import takewhile

import numpy as np
import torch
from torch import Tensor

from popcompile.runtime.cache import KVCache

BLOCK = 64


class PrefixCache:
    """Blocks of keys and values in memory, by the tokens that they belong to.

    limit: bytes of all blocks together. block: tokens of each.
    """

    def __init__(self, limit: int, block: int = BLOCK) -> None:
        self._limit, self._block = limit, block
        #: [keys and values of all layers, kv_heads, block, head_size] each, the least recently used first
        self._blocks: OrderedDict[bytes, Tensor] = OrderedDict()
        self.bytes = 0

    def held(self, ids: Sequence[int]) -> int:
        """How many tokens `find` returns."""
        return len(self._found(ids)) * self._block

    def find(self, ids: Sequence[int]) -> Tensor | None:
        """Keys and values [.., tokens, ..] of the longest beginning of `ids` that is held, in whole blocks."""
        found = self._found(ids)
        self._touch(found)
        return torch.cat([self._blocks[key] for key in found], dim=2) if found else None

    def store(self, ids: Sequence[int], cache: KVCache) -> None:
        """Keep the whole blocks of `ids`, which are the first tokens of a cache of one row."""
        keys = list(self._keys(ids))
        for index, key in enumerate(keys):
            if key in self._blocks:
                continue
            block = cache.packed(index * self._block, (index + 1) * self._block)
            if self.bytes + block.nbytes > self._limit and not self._make_room(block.nbytes, keys):
                keys = keys[:index]
                break
            self._blocks[key] = block
            self.bytes += block.nbytes
        self._touch(keys)

    def _found(self, ids: Sequence[int]) -> list[bytes]:
        return list(takewhile(self._blocks.__contains__, self._keys(ids)))

    def _keys(self, ids: Sequence[int]) -> Iterator[bytes]:
        """Of the whole blocks of `ids`."""
        hashed = hashlib.sha256()
        for begin in range(0, len(ids) - self._block + 1, self._block):
            hashed.update(np.asarray(ids[begin : begin + self._block], dtype=np.int64).tobytes())
            yield hashed.digest()

    def _touch(self, keys: Sequence[bytes]) -> None:
        """Mark blocks as used, the first of a prompt last: none is of use without those before it."""
        for key in reversed(keys):
            self._blocks.move_to_end(key)

    def _make_room(self, size: int, keep: Sequence[bytes]) -> bool:
        """Forget blocks, but for those of `keep`, until `size` bytes fit."""
        kept = set(keep)
        while self.bytes + size > self._limit:
            oldest = next((key for key in self._blocks if key not in kept), None)
            if oldest is None:
                return False
            self.bytes -= self._blocks.pop(oldest).nbytes
        return True
