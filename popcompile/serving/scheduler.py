"""One model, many requests: what they need is computed in one thread, and each is told its pieces as they come.

Answers do not depend on what else runs, but for the rounding of matrix products that have more rows. For as many
answers as have a place prompts are encoded and tokens decoded (`Worker`); others wait for one, the first come first.
Answers to one prompt come one behind the other, so one prompt at most is kept for those of its answers that still wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing

import torch
from transformers import PreTrainedTokenizerBase

from popcompile.runtime.generation import PopForCausalLM
from popcompile.serving.answer import Piece
from popcompile.serving.errors import ApiError
from popcompile.serving.merging import merged
from popcompile.serving.prefilling import Encoded
from popcompile.serving.sampling import Sampling
from popcompile.serving.worker import Prompt, Request, Worker

_LOG = logging.getLogger(__name__)


class Scheduler:
    """Answers prompts that are encoded step by step, many at a time."""

    def __init__(self, model: PopForCausalLM, tokenizer: PreTrainedTokenizerBase, max_concurrent: int) -> None:
        """max_concurrent: answers under way; each has a cache in memory, and one prompt more at most."""
        self._model, self._tokenizer = model, tokenizer
        self._is_ending, self._prompts = False, 0
        self._places = asyncio.Semaphore(max_concurrent)
        self._arrived: list[Request] = []
        self._under_way: set[Request] = set()
        self._working: asyncio.Task[None] | None = None
        #: PyTorch only picks tokens there; its own threads would take the cores from ONNX Runtime
        self._thread = ThreadPoolExecutor(1, "model", initializer=torch.set_num_threads, initargs=(1,))

    async def answers(
        self, encoding: Iterator[Encoded | None], samplings: Sequence[Sampling]
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """The pieces of several answers to one prompt, as they come, each with the index of its sampling.

        encoding: steps, of which the last gives the encoded prompt and those before None. Once this is closed, no more
        is computed for it. Raises ApiError after `end`.
        """
        prompt = Prompt(encoding, len(samplings))
        self._prompts += 1
        try:
            async with aclosing(merged(self._answer(prompt, sampling) for sampling in samplings)) as pieces:
                async for piece in pieces:
                    yield piece
        finally:
            self._prompts -= 1

    async def _answer(self, prompt: Prompt, sampling: Sampling) -> AsyncGenerator[Piece, None]:
        async with self._places:
            request = self._begin(prompt, sampling)
            try:
                while not isinstance(given := await request.given.get(), Exception):
                    yield given
                    if given.finish is not None:
                        return
                raise given
            finally:
                request.is_gone = True
                self._under_way.discard(request)

    def _begin(self, prompt: Prompt, sampling: Sampling) -> Request:
        if self._is_ending:
            raise _ending()
        request = Request(prompt, sampling)
        self._arrived.append(request)
        self._under_way.add(request)
        if self._working is None or self._working.done():
            self._working = asyncio.create_task(self._work())
        return request

    async def _work(self) -> None:
        """Step as long as there are requests. What a worker itself fails with ends them all, and it."""
        worker, loop = Worker(self._model, self._tokenizer), asyncio.get_running_loop()
        try:
            while (self._arrived or worker.is_busy()) and not self._is_ending:
                arrived, self._arrived = self._arrived, []
                for request, given in await loop.run_in_executor(self._thread, worker.step, arrived):
                    request.given.put_nowait(given)
            end: Exception = _ending()
        except Exception as error:
            _LOG.exception("a step failed for all requests under way")
            end = error
        for request in self._under_way:
            request.given.put_nowait(end)

    def are_shared(self) -> bool:
        """Whether there are several prompts, those whose answers wait for a place among them."""
        return self._prompts > 1

    def end(self) -> None:
        """Let every request end with the step that it is at."""
        self._is_ending = True

    def close(self) -> None:
        """End the thread, once the step that runs is done."""
        self.end()
        self._thread.shutdown(cancel_futures=True)


def _ending() -> ApiError:
    return ApiError(503, "the server is ending; ask again later")
