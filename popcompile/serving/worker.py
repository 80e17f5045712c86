"""What is computed for the requests under way, a step at a time: a chunk of a prompt, or a token of every answer."""

from __future__ import annotations

import asyncio
from collections import deque
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
class Request:
    """An answer that is asked for.

    encoding: steps, of which the last gives the encoded prompt and those before None. given: pieces for who asked, or
    why none follows. is_gone: nobody asks any more.
    """

    encoding: Iterator[Encoded | None]
    sampling: Sampling
    given: asyncio.Queue[Piece | Exception] = field(default_factory=asyncio.Queue)
    is_gone: bool = False


@dataclass(eq=False)
class _Row:
    """A request whose prompt was encoded. token: the last one of its answer."""

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
        self._prompts: deque[Request] = deque()
        self._rows: DecodeBatches[_Row] = DecodeBatches(model)
        #: tokens of short prompts since the last step of answers
        self._encoded = 0

    def is_busy(self) -> bool:
        """Whether there are steps to be done."""
        return bool(self._prompts or self._rows.rows())

    def step(self, arrived: Sequence[Request]) -> list[tuple[Request, Piece | Exception]]:
        """One step, after those that are gone were forgotten and `arrived` are there. Returns what it gives to whom."""
        self._prompts = deque(request for request in (*self._prompts, *arrived) if not request.is_gone)
        for row in self._rows.rows():
            if row.request.is_gone:
                self._rows.leave(row)
        if self._prompts and (self._encoded < _SHORT or not self._rows.rows()):
            return self._encode(self._prompts.popleft())
        self._encoded = 0
        return [(row.request, self._next(row, logits)) for row, logits in self._rows.step()]

    def _encode(self, request: Request) -> list[tuple[Request, Piece | Exception]]:
        """A chunk of a prompt; with its last one the answer begins."""
        try:
            encoded = next(request.encoding)
            if encoded is None:
                self._prompts.append(request)
                self._encoded = _SHORT
                return []
            self._encoded += encoded.prompt.shape[1] - encoded.cached
            return [(request, self._begin(request, encoded))]
        except Exception as error:
            return [(request, error)]

    def _begin(self, request: Request, encoded: Encoded) -> Piece:
        prompt, logits, cache, cached = encoded.prompt, encoded.logits, encoded.cache, encoded.cached
        pieces = answer(self._model, self._tokenizer, request.sampling, prompt, logits, cached)
        first = next(pieces)
        if first.finish is None:
            self._rows.join(_Row(request, pieces, first.token), cache.kv)
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
