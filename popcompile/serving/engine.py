"""One model, many requests: they take turns, a chunk of a prompt or a token each, in one thread.

A request has a cache of its own, and is computed as if it were alone, so answers do not depend on what else runs. Of as
many requests as have a place each has one step waiting at most, and steps are done in the order in which they came:
streams go on side by side, and wait for a chunk as long as it takes. Others wait for a place, the first come first.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Protocol, TypeVar, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from popcompile.runtime.generation import PopForCausalLM
from popcompile.serving.errors import ApiError
from popcompile.serving.prefilling import Encoded, Prefiller
from popcompile.serving.prefix_cache import PrefixCache
from popcompile.serving.sampling import Sampling, tokens
from popcompile.serving.text_stream import TextStream

_T = TypeVar("_T")
#: behind the last step
_NO_MORE = object()


class Piece(NamedTuple):
    """What a token adds to an answer: text, which may be empty. cached: tokens of the prompt that were not encoded, for
    their keys and values were held. finish: "stop" or "length" with the last one.
    """

    text: str
    cached: int
    finish: str | None


class Generator(Protocol):
    """Whatever answers prompts."""

    def generate(self, inputs: Mapping[str, Tensor], sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """An answer, a piece for every token. inputs: as `Prompts` makes them."""
        ...


class Turns:
    """One thread whose steps many requests share."""

    def __init__(self, max_concurrent: int) -> None:
        """max_concurrent: requests that take turns; each has a cache in memory."""
        self._is_ending, self._count = False, 0
        self._places = asyncio.Semaphore(max_concurrent)
        #: PyTorch only picks tokens there; its own threads would take the cores from ONNX Runtime
        self._thread = ThreadPoolExecutor(1, "model", initializer=torch.set_num_threads, initargs=(1,))

    async def take(self, steps: Iterator[_T | None]) -> AsyncGenerator[_T, None]:
        """What the steps of a request give, each when it is its turn; None is nothing yet. No more is computed where
        nobody asks for the next. Raises ApiError after `end`.
        """
        self._count += 1
        try:
            async with self._places:
                loop = asyncio.get_running_loop()
                while not self._is_ending:
                    given = await loop.run_in_executor(self._thread, next, steps, _NO_MORE)
                    if given is _NO_MORE:
                        return
                    if given is not None:
                        yield cast(_T, given)
                raise ApiError(503, "the server is ending; ask again later")
        finally:
            self._count -= 1

    def are_shared(self) -> bool:
        """Whether there are several requests, those that wait for a place among them."""
        return self._count > 1

    def end(self) -> None:
        """Let every request end with the step that it is at."""
        self._is_ending = True

    def close(self) -> None:
        """End the thread, once the step that runs is done."""
        self.end()
        self._thread.shutdown(cancel_futures=True)


class Engine:
    """Answers prompts with a model on this machine."""

    def __init__(
        self,
        model: PopForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_concurrent: int,
        prefixes: PrefixCache | None = None,
        chunk: int = 0,
    ) -> None:
        """max_concurrent: as of `Turns`. prefixes, chunk: as of `Prefiller`."""
        self._model, self._tokenizer = model, tokenizer
        self._prefiller = Prefiller(model, prefixes, chunk)
        self.turns = Turns(max_concurrent)

    def generate(self, inputs: Mapping[str, Tensor], sampling: Sampling) -> AsyncGenerator[Piece, None]:
        """See `Generator`."""
        return self.turns.take(self._pieces(inputs, sampling))

    def _pieces(self, inputs: Mapping[str, Tensor], sampling: Sampling) -> Iterator[Piece | None]:
        for encoded in self._prefiller.steps(inputs, self.turns.are_shared):  # a lone prompt is sooner encoded whole
            if encoded is None:
                yield None
            else:
                yield from answer(self._model, self._tokenizer, encoded, sampling)


def answer(
    model: PopForCausalLM, tokenizer: PreTrainedTokenizerBase, encoded: Encoded, sampling: Sampling
) -> Iterator[Piece]:
    """The answer to a prompt that was encoded, piece by piece; the cache grows."""
    text = TextStream(tokenizer, sampling.stop)
    for token in tokens(model, encoded.prompt, sampling, encoded.logits, encoded.cache):
        new = text.put(token.id)
        finish = "stop" if text.is_stopped else token.finish
        yield Piece(new if finish is None else new + text.end(), encoded.cached, finish)
        if finish is not None:
            return
