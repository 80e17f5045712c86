"""Whatever answers prompts, and what does on this machine."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Protocol

from torch import Tensor
from transformers import PreTrainedTokenizerBase

from popcompile.runtime.generation import PopForCausalLM
from popcompile.serving.answer import Piece
from popcompile.serving.prefilling import Prefiller
from popcompile.serving.prefix_cache import PrefixCache
from popcompile.serving.sampling import Sampling
from popcompile.serving.scheduler import Scheduler


class Generator(Protocol):
    """Whatever answers prompts. places: how many answers it computes at the same time."""

    places: int

    def generate(
        self, inputs: Mapping[str, Tensor], samplings: Sequence[Sampling]
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """Answers to one prompt, a piece for every token as it comes, with the index of its sampling.

        inputs: as `Prompts` makes them.
        """
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
        chunk: int = 0,
    ) -> None:
        """max_concurrent: as of `Scheduler`. prefixes, chunk: as of `Prefiller`."""
        self.places = max_concurrent
        self._prefiller = Prefiller(model, prefixes, chunk)
        self.scheduler = Scheduler(model, tokenizer, max_concurrent)

    def generate(
        self, inputs: Mapping[str, Tensor], samplings: Sequence[Sampling]
    ) -> AsyncGenerator[tuple[int, Piece], None]:
        """See `Generator`."""
        # a lone prompt is sooner encoded whole
        return self.scheduler.answers(self._prefiller.steps(inputs, self.scheduler.are_shared), samplings)
