"""The cache of a compiled model: its two names, in every version of transformers, and what generation asks of it."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from bad_input import refusal
from transformers import Cache

from popcompile.runtime.generation import PopForCausalLM, load
from popcompile.runtime.generation_cache import PopCache
from popcompile.runtime.session import Runtime

IDS = torch.tensor([[5, 9, 2, 11, 7]])
MORE = torch.tensor([[3, 4]])
NAMES = ("past_key_values", "cache")


@pytest.fixture(scope="module")
def compiled(tiny_package: Path) -> PopForCausalLM:
    return load(tiny_package)


@pytest.fixture
def silence(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """Fails where a warning is given, or logged by transformers."""
    transformers.logging.enable_propagation()
    try:
        with warnings.catch_warnings(action="error"), caplog.at_level(logging.WARNING):
            yield
        assert not caplog.messages
    finally:
        transformers.logging.disable_propagation()


def generate(model: PopForCausalLM, ids: torch.Tensor, **arguments: Any) -> Any:
    few = {"max_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True, "eos_token_id": None}
    return model.generate(ids, attention_mask=torch.ones_like(ids), **few, **arguments)


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("name", NAMES)
def test_forward_takes_and_returns_either_name(compiled: PopForCausalLM, name: str) -> None:
    first = compiled(IDS)
    assert first.past_key_values is first.cache
    second = compiled(MORE, **{name: first.cache})
    assert torch.equal(second.logits, compiled(MORE, cache=compiled(IDS).cache).logits)
    assert second.cache.get_seq_length() == 7
    logits, cache = compiled(IDS, return_dict=False)
    assert isinstance(cache, PopCache) and torch.equal(logits, first.logits)
    without = compiled(IDS, use_cache=False)
    assert without.cache is without.past_key_values is None


@pytest.mark.usefixtures("silence")
@pytest.mark.parametrize("name", NAMES)
def test_generate_takes_and_returns_either_name(
    compiled: PopForCausalLM, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = generate(compiled, IDS)
    assert first.past_key_values is first.cache
    whole = torch.cat((first.sequences, MORE), dim=1)
    fed: list[int] = []
    feed = Runtime.feed
    monkeypatch.setattr(
        Runtime, "feed", lambda self, rows, *a, **k: (fed.append(len(rows[0])), feed(self, rows, *a, **k))[1]
    )
    second = generate(compiled, whole, **{name: copy.deepcopy(first.cache)})
    assert fed == [3, 1, 1]  # the last token of the first answer and two new ones: nothing is encoded again
    assert second.cache.get_seq_length() == whole.shape[1] + 2
    assert torch.equal(generate(compiled, whole, prefill="full").sequences[:, :10], whole)
    assert generate(compiled, IDS, use_cache=False).past_key_values is None


def test_two_names_are_one_argument(compiled: PopForCausalLM) -> None:
    one, other = compiled(IDS).cache, compiled(IDS).cache
    line = "past_key_values and cache are two names of one argument; give one of them"
    assert refusal(lambda: compiled(MORE, past_key_values=one, cache=other)) == line
    whole = torch.cat((IDS, MORE), dim=1)
    assert refusal(lambda: generate(compiled, whole, past_key_values=one, cache=other)) == line
    assert compiled(MORE, past_key_values=one, cache=one).cache is one


def test_what_generate_passes_is_not_the_users_mistake(
    compiled: PopForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release of transformers that passes one more argument, as 5.24 did with `cache`."""
    prepare = transformers.GenerationMixin.prepare_inputs_for_generation

    def prepare_more(*args: Any, **kwargs: Any) -> dict[str, Any]:
        return {**prepare(*args, **kwargs), "novelty": torch.ones(1)}

    monkeypatch.setattr(transformers.GenerationMixin, "prepare_inputs_for_generation", prepare_more)
    line = refusal(lambda: generate(compiled, IDS))
    assert line.startswith(f"generate of transformers {transformers.__version__} passes novelty")
    assert "leave it out" not in line
    line = refusal(lambda: generate(compiled, IDS, novelty=1))
    assert line == "novelty: not taken by a compiled model; leave it out"


#: of transformers' Cache, what a PopCache has no layers for that could be asked
NOT_ASKED = {
    "get_conv_state", "update_conv_state", "get_recurrent_state", "update_recurrent_state", "has_previous_state",
    "update_indexer", "get_query_offset",
}  # fmt: skip


def test_cache_answers_whatever_is_asked_of_one() -> None:
    """transformers' Cache asks its layers, of which a PopCache has none: all([]) would say that they are linear."""
    asked = {name for name in vars(Cache) if not name.startswith("_")}
    inherited = asked - vars(PopCache).keys() - NOT_ASKED
    assert not inherited, f"transformers {transformers.__version__} has more members of Cache; define in PopCache"
