"""Encode prompts by a package's full or pruned prefill, and predict what follows: for all that measures the two."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from popcompile.errors import PopcompileError
from popcompile.runtime.cache import KVCache
from popcompile.runtime.session import Runtime, Stage


@dataclass(frozen=True)
class Encoder:
    """A way to encode prompts: the graph `stage` of a runtime, whose decode graph continues them."""

    runtime: Runtime
    stage: Stage

    def encode(self, prompt: Tensor) -> tuple[Tensor, KVCache]:
        """The boundary token's logits [1, vocabulary] and the cache after a prompt [tokens]."""
        cache = self.runtime.new_cache(1)
        return self.runtime.feed([prompt], cache, self.stage)[0], cache

    def predict(self, first: Tensor, cache: KVCache, continuation: Tensor) -> Tensor:
        """Logits [tokens, vocabulary] that predict each token of `continuation` [tokens], after those that `encode`
        returned. The cache grows by all tokens but the last. Raises PopcompileError where they are not finite.
        """
        if len(continuation) > 1:
            rest = self.runtime.feed([continuation[:-1]], cache, "decode", every_token=True)[0]
            first = torch.cat((first, rest))
        if not bool(torch.isfinite(first).all()):
            raise PopcompileError(
                f"{self.runtime.folder}: the graphs compute NaN or infinity on this text; convert with --dtype fp32"
            )
        return first
