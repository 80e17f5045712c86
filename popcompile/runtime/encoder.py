"""Encode prompts by a package's full or pruned prefill, and predict what follows: for all that measures the two."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from popcompile.errors import PopcompileError
from popcompile.runtime.cache import KVCache
from popcompile.runtime.embeddings import RowImages
from popcompile.runtime.session import Runtime, Stage


@dataclass(frozen=True)
class Encoder:
    """A way to encode prompts: the graph `stage` of a runtime, whose decode graph continues them."""

    runtime: Runtime
    stage: Stage

    def encode(self, prompt: Tensor, images: RowImages | None = None) -> tuple[Tensor, KVCache]:
        """The boundary token's logits [1, vocabulary] and the cache after a prompt [tokens]. images: among its tokens,
        as this package's vision graph encodes them.
        """
        cache = self.runtime.new_cache(1)
        return self.runtime.feed([prompt], cache, self.stage, images=[images])[0], cache

    def predict(self, first: Tensor, cache: KVCache, continuation: Tensor) -> Tensor:
        """Logits [tokens, vocabulary] that predict each token of `continuation` [tokens], after those that `encode`
        returned. The cache grows by all tokens but the last. Raises PopcompileError where they are not finite.
        """
        if len(continuation) > 1:
            rest = self.runtime.feed([continuation[:-1]], cache, "decode", every_token=True)[0]
            first = torch.cat((first, rest))
        return self._finite(first)

    def write(
        self, first: Tensor, cache: KVCache, count: int, ends: Collection[int], choose: Callable[[Tensor], int]
    ) -> list[int]:
        """At most `count` tokens, of which the last may be one of `ends`, after those that `encode` returned; the cache
        grows. choose: a token, by its logits [vocabulary]. Raises PopcompileError as `predict` does.
        """
        tokens = [choose(self._finite(first)[0])]
        while len(tokens) < count and tokens[-1] not in ends:
            logits = self.runtime.feed([torch.tensor(tokens[-1:])], cache, "decode")[0]
            tokens.append(choose(self._finite(logits)[0]))
        return tokens

    def _finite(self, logits: Tensor) -> Tensor:
        if not bool(torch.isfinite(logits).all()):
            raise PopcompileError(
                f"{self.runtime.folder}: the graphs compute NaN or infinity on this prompt; convert with --dtype fp32"
            )
        return logits
