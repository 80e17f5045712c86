"""What is computed for the requests under way, a step at a time: a chunk of a prompt, or a token of every answer."""

from __future__ import annotations

import asyncio
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from popcompile.runtime.generation import PopForCausalLM
from popcompile.serving.answer import Piece, answer
from popcompile.serving.decode_batches import DecodeBatches
from popcompile.serving.prefilling import Encoded
from popcompile.serving.sampling import Sampling

#: tokens of short prompts that are encoded between two steps of answers, before one that has more
_SHORT = 512


@dataclass(eq=False)
class Prompt:
    """What one or more answers are asked for.

    encoding: steps, of which the last gives the encoded prompt and those before None. left: answers that have not
    begun. encoded: kept until all of them have.
    """

    encoding: Iterator[Encoded | None]
    left: int
    encoded: Encoded | None = None


@dataclass(eq=False)
class Request:
    """An answer that is asked for.

    given: pieces for who asked, or why none follows. is_gone: nobody asks any more.
    """

    prompt: Prompt
    sampling: Sampling
    given: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)
    is_gone: bool = False


@dataclass(eq=False)
class _Row:
    """An answer that has begun. token: its last one."""

    request: Request
    pieces: Generator[Piece, Tensor, None]
    token: int


class Worker:
    """Steps alternate between prompts, of which each gets a chunk in turn, and the next token of all answers: a stream
    waits for one chunk at most, and for short prompts before it, of 512 tokens together at most, which are encoded one
    after the other. What fails for one request ends that one.
    """

    def __init__(self, model: PopForCausalLM, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model, self._tokenizer = model, tokenizer
        #: whose answers have not begun
        self._waiting: list[Request] = []
        self._rows: DecodeBatches[_Row] = DecodeBatches(model)
        #: tokens of short prompts since the last step of answers
        self._encoded = 0

    def is_busy(self) -> bool:
        """Whether there are steps to be done."""
        return bool(self._waiting or self._rows.rows())

    def step(self, arrived: Sequence[Request]) -> list[tuple[Request, Piece | Exception]]:
        """One step, after those that are gone were forgotten and `arrived` are there. Returns what it gives to whom."""
        self._waiting = [request for request in (*self._waiting, *arrived) if not request.is_gone]
        for row in self._rows.rows():
            if row.request.is_gone:
                self._rows.leave(row)
        if self._waiting and (self._encoded < _SHORT or not self._rows.rows()):
            return self._encode(self._waiting[0].prompt)
        self._encoded = 0
        return [(row.request, self._next(row, logits)) for row, logits in self._rows.step()]

    def _encode(self, prompt: Prompt) -> list[tuple[Request, Piece | Exception]]:
        """A chunk of a prompt; with its last one the answers begin, also those that come later."""
        asking = [request for request in self._waiting if request.prompt is prompt]
        self._waiting = [request for request in self._waiting if request.prompt is not prompt]
        try:
            encoded = prompt.encoded or self._next_chunk(prompt)
        except Exception as error:
            return [(request, error) for request in asking]
        if encoded is None:
            self._waiting += asking
            return []
        return [(request, self._begin(request, encoded)) for request in asking]

    def _next_chunk(self, prompt: Prompt) -> Encoded | None:
        encoded = prompt.encoded = next(prompt.encoding)
        self._encoded = _SHORT if encoded is None else self._encoded + encoded.prompt.shape[1] - encoded.cached
        return encoded

    def _begin(self, request: Request, encoded: Encoded) -> Piece | Exception:
        """The answer's first piece, or why there is none."""
        prompt = request.prompt
        prompt.left -= 1
        if not prompt.left:
            prompt.encoded = None
        pieces = answer(self._model, self._tokenizer, request.sampling, encoded.prompt, encoded.logits, encoded.cached)
        try:
            first = next(pieces)
            if first.finish is None:
                self._rows.join(_Row(request, pieces, first.token), encoded.cache.kv, is_shared=prompt.left > 0)
        except Exception as error:
            return error
        return first

    def _next(self, row: _Row, logits: Tensor | Exception) -> Piece | Exception:
        """The answer's next piece, or why there is none."""
        if isinstance(logits, Exception):
            return logits
        try:
            piece = row.pieces.send(logits)
        except Exception as error:
            self._rows.leave(row)
            return error
        row.token = piece.token
        if piece.finish is not None:
            self._rows.leave(row)
        return piece
