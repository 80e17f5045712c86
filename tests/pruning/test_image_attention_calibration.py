"""Calibration of a decoder whose tokens of an image see all of it: layers run one by one are those of the graph.

The model is Gemma-3's text decoder, whose sliding layers see fewer tokens than an image has.
"""

from __future__ import annotations

from functools import cache

import image_attention_reference as reference
import pytest
import torch
from compiled_decoder import CompiledDecoder, difference, empty_cache, run_decoder
from image_attention_reference import Image, embeddings_of, gemma3, make_prompt
from torch import Tensor

from popcompile.pruning.hidden_states import HiddenStates
from popcompile.pruning.layerwise import LayerwiseModel
from popcompile.pruning.pruned_prefill import Prompts, last_hidden_state
from popcompile.pruning.regression import Calibration

GEMMA = CompiledDecoder(gemma3())
PROMPT = make_prompt([3, Image(), 2, Image()])
TOLERANCE = 1e-4


@cache
def layers() -> LayerwiseModel:
    return LayerwiseModel(GEMMA.with_weights(GEMMA.canonical, "model"))


def causal(count: int) -> Tensor:
    return torch.ones(1, count, count, dtype=torch.bool).tril()


@torch.no_grad()
def test_layer_by_layer_is_the_model() -> None:
    wide = embeddings_of(GEMMA.model, PROMPT)
    states = HiddenStates(layers(), wide, 0)
    tokens = states.tokens(slice(0, 1))
    logits = layers().logits(states.before(layers().num_layers), tokens)
    assert difference([logits], [reference.full_logits(GEMMA.model, PROMPT)]) < TOLERANCE
    assert difference([logits], [reference.full_logits(GEMMA.model, PROMPT, causal=True)]) > 0.01


@pytest.mark.parametrize("window", [1, 9, 17])
@torch.no_grad()
def test_pruned_prefill_before_it_is_compiled_is_the_graph(window: int) -> None:
    """The tail is the end of an image, or all of it and a mark."""
    wide, pruned = embeddings_of(GEMMA.model, PROMPT), (1, 3)
    count = wide.shape[1] - window
    slots = torch.arange(wide.shape[1])[None]
    parts = [(wide[:, :count], slots[:, :count]), (wide[:, count:], slots[:, count:]), (wide, slots)]
    prompts = Prompts(*(layers().tokens(*part) for part in parts), causal(wide.shape[1]))
    entering = (wide[:, :count, :-1], wide[:, count:, :-1])
    y = last_hidden_state(layers(), prompts, entering, 0, list(pruned), Calibration())
    inputs = [wide, torch.ones_like(slots), *empty_cache(GEMMA.canonical)]
    expected, _ = run_decoder(GEMMA.graph("prefill", pruned, window), inputs)
    assert difference([layers().logits(y, prompts.tail)[:, -1:]], [expected]) < TOLERANCE
