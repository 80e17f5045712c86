"""A prompt becomes a cache and logits, and logits become tokens, one at a time: transformers' `generate` in two halves.

Neither feeds tokens back, so rows of many requests are fed together, and the halves can run on two machines.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationConfig

from popcompile.runtime.generation import PopForCausalLM
from popcompile.runtime.generation_cache import PopCache

#: temperatures below this are 0
_GREEDY = 1e-5


@dataclass(frozen=True)
class Sampling:
    """How an answer's tokens are chosen.

    new_tokens: at most. temperature, top_p, seed: None where the request leaves them to the package's
    generation_config.json, and the seed to chance. stop: strings before which the text ends.
    """

    new_tokens: int
    temperature: float | None = None
    top_p: float | None = None
    seed: int | None = None
    stop: tuple[str, ...] = ()

    def arguments(self, config: GenerationConfig) -> dict[str, Any]:
        """Of `generate`: sampling at a temperature above 0, and with a top_p below 1 where none is given."""
        chosen: dict[str, Any] = {"max_new_tokens": self.new_tokens}
        if self.temperature is not None:
            chosen["do_sample"] = self.temperature >= _GREEDY
        elif self.top_p is not None and self.top_p < 1:
            chosen["do_sample"] = True
        if chosen.get("do_sample", config.do_sample):
            given = {"temperature": self.temperature, "top_p": self.top_p}
            chosen |= {name: value for name, value in given.items() if value is not None}
        return chosen


class Token(NamedTuple):
    """finish: why it is the last one, None where others follow."""

    id: int
    finish: str | None


@torch.no_grad()
def prefill(model: PopForCausalLM, inputs: Mapping[str, Tensor], cache: PopCache) -> Tensor:
    """Logits [1, vocabulary] of what follows a prompt; the cache, which may hold its beginning, grows by the rest.

    inputs: input_ids [1, tokens] of the whole prompt, and what the processor made of its images.
    """
    given = dict(inputs)
    new = given.pop("input_ids")[:, cache.get_seq_length() :]
    output = model(new, past_key_values=cache, prefill=model.prefill, logits_to_keep=1, **given)
    return output.logits[:, -1]


def tokens(model: PopForCausalLM, prompt: Tensor, sampling: Sampling, logits: Tensor) -> Generator[Token, Tensor, None]:
    """What follows a prompt [1, tokens], token by token: those of `model.generate` with the same settings, whose random
    numbers torch.manual_seed(seed) draws. logits: [1, vocabulary] behind the prompt; those behind each token but the
    last are sent.
    """

    def loop(
        model: PopForCausalLM,
        input_ids: Tensor,
        logits_processor: Any,
        stopping_criteria: Any,
        generation_config: GenerationConfig,
        **_: Any,
    ) -> Generator[Token, Tensor, None]:
        choose, ends = _chooser(generation_config, sampling.seed), _ends(generation_config)
        ids, following = input_ids, logits
        while True:
            scores = logits_processor(ids, following.to(torch.float32, copy=True))
            token = choose(scores)
            ids = torch.cat((ids, token), dim=1)
            is_end, is_last = int(token) in ends, bool(stopping_criteria(ids, scores).all())
            if is_last:
                at_limit = ids.shape[1] - input_ids.shape[1] >= sampling.new_tokens
                yield Token(int(token), "length" if at_limit and not is_end else "stop")
                return
            following = yield Token(int(token), None)

    return model.generate(prompt, custom_generate=loop, **sampling.arguments(model.generation_config))


def _chooser(config: GenerationConfig, seed: int | None) -> Callable[[Tensor], Tensor]:
    """Chooses a token [1, 1] by its scores [1, vocabulary]."""
    if not config.do_sample:
        return lambda scores: scores.argmax(dim=-1, keepdim=True)
    random = torch.Generator()
    if seed is None:
        random.seed()
    else:
        random.manual_seed(seed)
    return lambda scores: torch.multinomial(scores.softmax(dim=-1), 1, generator=random)


def _ends(config: GenerationConfig) -> set[int]:
    """Tokens that end an answer."""
    ends = config.eos_token_id
    return set(ends) if isinstance(ends, list) else set() if ends is None else {ends}
