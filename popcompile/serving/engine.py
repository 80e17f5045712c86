"""One model, many requests: they take turns, a prefill or a token each, in one thread.

A request has a cache of its own, and is computed as if it were alone, so answers do not depend on what else runs. Of as
many requests as have a place each has one step waiting at most, and steps are done in the order in which they came:
streams go on side by side, and wait for a prefill as long as it takes. Others wait for a place, the first come first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from popcompile.runtime.cache import KVCache
from popcompile.runtime.generation import PopForCausalLM
from popcompile.runtime.generation_cache import PopCache
from popcompile.serving.errors import ApiError
from popcompile.serving.prefix_cache import PrefixCache
from popcompile.serving.sampling import Sampling, prefill, tokens
from popcompile.serving.text_stream import TextStream


class Piece(NamedTuple):
    """What a token adds to an answer: text, which may be empty. cached: tokens of the prompt that were not encoded, for
    their keys and values were held. finish: "stop" or "length" with the last one.
    """

    text: str
    cached: int
    finish: str | None


class Generator(Protocol):
    """Whatever answers prompts."""

    def generate(self, inputs: Mapping[str, Tensor], sampling: Sampling) -> AsyncIterator[Piece]:
        """An answer, a piece for every token. inputs: as `Prompts` makes them."""
        ...


class Engine:
    """Answers prompts with a model on this machine."""

    def __init__(
        self,
        model: PopForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_concurrent: int,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """max_concurrent: requests that take turns; each has a cache in memory. prefixes: None keeps none."""
        self._model, self._tokenizer = model, tokenizer
        self._prefixes = prefixes if prefixes is not None and reuses_prefixes(model) else None
        self._is_ending = False
        self._places = asyncio.Semaphore(max_concurrent)
        #: PyTorch only picks tokens there; its own threads would take the cores from ONNX Runtime
        self._thread = ThreadPoolExecutor(1, "model", initializer=torch.set_num_threads, initargs=(1,))

    async def generate(self, inputs: Mapping[str, Tensor], sampling: Sampling) -> AsyncIterator[Piece]:
        """See `Generator`. No more is computed where nobody asks for the next piece. Raises ApiError after `end`."""
        async with self._places:
            pieces, loop = self._pieces(inputs, sampling), asyncio.get_running_loop()
            while not self._is_ending:
                piece = await loop.run_in_executor(self._thread, next, pieces, None)
                if piece is None:
                    return
                yield piece
            raise ApiError(503, "the server is ending; ask again later")

    def end(self) -> None:
        """Let every answer end with the step that it is at."""
        self._is_ending = True

    def close(self) -> None:
        """End the thread, once the step that runs is done."""
        self.end()
        self._thread.shutdown(cancel_futures=True)

    def _pieces(self, inputs: Mapping[str, Tensor], sampling: Sampling) -> Iterator[Piece]:
        ids = inputs["input_ids"]
        reusable = ids[0, : context_tokens(self._model, ids.shape[1])].tolist() if set(inputs) == {"input_ids"} else []
        cache = self._begin(reusable)
        cached = cache.get_seq_length()
        logits = prefill(self._model, inputs, cache)
        for piece in answer(self._model, self._tokenizer, ids, sampling, logits, cache):
            yield piece._replace(cached=cached)
            if reusable and self._prefixes is not None:
                self._prefixes.store(reusable, cache.kv)
                reusable = []

    def _begin(self, reusable: list[int]) -> PopCache:
        """The cache to encode a prompt with: empty, or with what is held of its first tokens."""
        held = self._prefixes.find(reusable) if self._prefixes is not None else None
        if held is None:
            return PopCache(self._model.runtime.new_cache(1))
        return text_cache(KVCache.unpacked(held, self._model.runtime.provider.device))


def answer(
    model: PopForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompt: Tensor,
    sampling: Sampling,
    logits: Tensor,
    cache: PopCache,
) -> Iterator[Piece]:
    """The answer to a prompt [1, tokens] that was encoded: logits and cache behind it."""
    text = TextStream(tokenizer, sampling.stop)
    for token in tokens(model, prompt, sampling, logits, cache):
        new = text.put(token.id)
        finish = "stop" if text.is_stopped else token.finish
        yield Piece(new if finish is None else new + text.end(), 0, finish)
        if finish is not None:
            return


def text_cache(kv: KVCache) -> PopCache:
    """A cache of one row whose tokens were all seen."""
    cache = PopCache(kv)
    cache.seen = torch.ones((1, kv.lengths[0]), dtype=torch.bool)
    return cache


def context_tokens(model: PopForCausalLM, prompt: int) -> int:
    """How many of a prompt's tokens have keys and values that do not depend on where the prompt ends."""
    manifest = model.manifest
    window = manifest.window if manifest.pruned and model.choose_prefill() == "pop" else 1
    return max(0, prompt - window)


def reuses_prefixes(model: PopForCausalLM) -> bool:
    """Whether a prompt's beginning has the same keys and values in a longer prompt. With longrope it does not: the
    frequencies are those for the length of the whole prompt.
    """
    text = model.config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    kinds = [rope, *(part for part in rope.values() if isinstance(part, dict))]
    return all(kind.get("rope_type", kind.get("type")) != "longrope" for kind in kinds)
