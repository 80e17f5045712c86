"""The first half of an answer: a prompt is encoded, with what is held of its beginning, and may travel from here.

A long prompt is encoded in chunks, so that other requests go on between them. A chunk is encoded as if the prompt
ended there, and its window, which took every layer, is forgotten and encoded again with the next one.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from popcompile.rope import depends_on_length
from popcompile.runtime.cache import KVCache
from popcompile.runtime.generation import PopForCausalLM
from popcompile.runtime.generation_cache import PopCache
from popcompile.serving.prefix_cache import PrefixCache
from popcompile.serving.sampling import prefill


@dataclass(frozen=True)
class Encoded:
    """A prompt [1, tokens], the logits [1, vocabulary] of what follows, and the cache behind it.

    cached: tokens whose keys and values were held and not computed.
    """

    prompt: Tensor
    logits: Tensor
    cache: PopCache
    cached: int

    def packed(self) -> Packed:
        """The same as three arrays, to be sent elsewhere."""
        kv = self.cache.kv
        values = kv.packed(0, kv.lengths[0]).view(torch.uint8)
        return Packed(self.prompt.numpy(), self.logits.numpy(), values.numpy(), kv.deltas[0], self.cached)


@dataclass(frozen=True)
class Packed:
    """An encoded prompt in three arrays. values: the bytes of `KVCache.packed`, for NumPy has no bf16. delta: the next
    position less the next slot.
    """

    prompt: np.ndarray
    logits: np.ndarray
    values: np.ndarray
    delta: int
    cached: int

    def unpacked(self, model: PopForCausalLM) -> Encoded:
        """For a model of the same package."""
        with warnings.catch_warnings(action="ignore"):  # arrays from a store are read-only, and are only read
            prompt, logits, values = map(torch.from_numpy, (self.prompt, self.logits, self.values))
        kv = KVCache.unpacked(values.view(model.runtime.cache_dtype), model.runtime.provider.device, self.delta)
        return Encoded(prompt, logits, _seen(kv), self.cached)


class Prefiller:
    """Encodes prompts, and keeps the keys and values of their beginnings."""

    def __init__(self, model: PopForCausalLM, prefixes: PrefixCache | None = None, chunk: int = 0) -> None:
        """prefixes: None keeps none. chunk: tokens of a prompt that are encoded at a time, 0 for all."""
        self._model, self._reuses, self._chunk = model, not depends_on_length(model.config), chunk
        self._prefixes = prefixes if self._reuses else None

    def encode(self, inputs: Mapping[str, Tensor]) -> Encoded:
        """inputs: input_ids [1, tokens], and what the processor made of a prompt's images."""
        return next(encoded for encoded in self.steps(inputs) if encoded is not None)

    def steps(
        self, inputs: Mapping[str, Tensor], in_chunks: Callable[[], bool] = lambda: True
    ) -> Iterator[Encoded | None]:
        """`encode`, a chunk at a time: None after every one but the last. in_chunks: whether what is left is to be cut,
        which is asked before each.
        """
        ids, reusable = inputs["input_ids"], self._reusable(inputs)
        cache, cached = PopCache(self._model.runtime.new_cache(1)), 0
        while True:
            known = cache.get_seq_length()
            if (held := self._held(reusable, known)) is not None:
                cache, cached = held, cached + held.get_seq_length() - known
            cut = bool(reusable) and in_chunks()
            end = self._chunk_end(ids.shape[1], cache.get_seq_length()) if cut else ids.shape[1]
            logits = prefill(self._model, {**inputs, "input_ids": ids[:, :end]}, cache)
            context = context_tokens(self._model, end)
            if self._prefixes is not None:  # at once: of prompts that came together the next begins alike
                self._prefixes.store(reusable[:context], cache.kv)
            if end == ids.shape[1]:
                yield Encoded(ids, logits, cache, cached)
                return
            cache.forget(context)
            yield None

    def _held(self, reusable: list[int], known: int) -> PopCache | None:
        """More of a prompt's beginning than its first `known` tokens; other requests may have encoded it by now."""
        if self._prefixes is None or self._prefixes.held(reusable) <= known:
            return None
        found = self._prefixes.find(reusable)
        return None if found is None else _seen(KVCache.unpacked(found, self._model.runtime.provider.device))

    def _chunk_end(self, tokens: int, known: int) -> int:
        """Up to where a prompt of so many tokens is encoded next, of which the first `known` are. What is left goes
        with the last chunk where it is less than half of one.
        """
        end = known + self._chunk + tokens - context_tokens(self._model, tokens)
        return end if self._chunk > 0 and end + self._chunk // 2 < tokens else tokens

    def _reusable(self, inputs: Mapping[str, Tensor]) -> list[int]:
        """The tokens whose keys and values do not depend on what follows them: none where there are images, which ids
        do not tell apart.
        """
        if not self._reuses or set(inputs) != {"input_ids"}:
            return []
        ids = inputs["input_ids"][0]
        return ids[: context_tokens(self._model, len(ids))].tolist()


def context_tokens(model: PopForCausalLM, prompt: int) -> int:
    """How many of a prompt's tokens have keys and values that do not depend on where the prompt ends."""
    manifest = model.manifest
    window = manifest.window if manifest.pruned and model.choose_prefill() == "pop" else 1
    return max(0, prompt - window)


def _seen(kv: KVCache) -> PopCache:
    """A cache of one row whose tokens were all seen."""
    cache = PopCache(kv)
    cache.seen = torch.ones((1, kv.lengths[0]), dtype=torch.bool)
    return cache
