"""An answer, piece by piece: what logits choose, as text."""

from __future__ import annotations

from collections.abc import Generator
from typing import NamedTuple

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from popcompile.runtime.generation import PopForCausalLM
from popcompile.serving.sampling import Sampling, tokens
from popcompile.serving.text_stream import TextStream


class Piece(NamedTuple):
    """What a token adds to an answer: text, which may be empty. cached: tokens of the prompt that were not encoded, for
    their keys and values were held. finish: "stop" or "length" with the last one.
    """

    token: int
    text: str
    cached: int
    finish: str | None


def answer(
    model: PopForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    sampling: Sampling,
    prompt: Tensor,
    logits: Tensor,
    cached: int,
) -> Generator[Piece, Tensor, None]:
    """The answer to a prompt [1, tokens]. logits: [1, vocabulary] behind it; those behind each piece's token but the
    last are sent.
    """
    text = TextStream(tokenizer, sampling.stop)
    chosen = tokens(model, prompt, sampling, logits)
    token = next(chosen)
    while True:
        new = text.put(token.id)
        finish = "stop" if text.is_stopped else token.finish
        if finish is not None:
            yield Piece(token.id, new + text.end(), cached, finish)
            return
        logits = yield Piece(token.id, new, cached, None)
        token = chosen.send(logits)
