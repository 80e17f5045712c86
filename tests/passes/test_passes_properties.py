"""Prefill for any model, any set of pruned layers and any batch: the reference's logits and cache, row by row.

The graphs run in PyTorch, before they are lowered. Tracing takes a second, so configs come from a list and are traced
once; prune sets, batches, lengths and pasts are drawn.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

import torch
from conftest import (
    Inputs,
    make_inputs,
    materialise,
    run_graph,
    tiny_gemma3,
    tiny_llama,
    tiny_model,
    tiny_moe,
    transformers_forward,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import pop_prefill
from torch import Tensor, fx
from transformers import PreTrainedModel

from popcompile.frontend.tracing import trace
from popcompile.passes import PassManager, Program, transformations

SLIDING, FULL = "sliding_attention", "full_attention"
CONFIGS = {
    "one layer": tiny_llama(num_hidden_layers=1),
    "tied": tiny_llama(tie_word_embeddings=True),
    "experts": tiny_moe(num_hidden_layers=3),
    "multi-query, biases": tiny_llama(num_hidden_layers=3, num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    "multi-head, wide heads": tiny_llama(num_hidden_layers=4, num_key_value_heads=4, head_dim=16),
    "llama3 RoPE": tiny_llama(
        num_hidden_layers=4,
        rope_parameters={
            "rope_type": "llama3", "rope_theta": 1e4, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    ),
    "gemma3": tiny_gemma3(),
    "gemma3, window 3": tiny_gemma3(num_hidden_layers=4, layer_types=[SLIDING, FULL] * 2, sliding_window=3),
    "gemma3, all sliding, untied": tiny_gemma3(
        num_hidden_layers=2, layer_types=[SLIDING] * 2, sliding_window=4, tie_word_embeddings=False,
        num_key_value_heads=1,
    ),
}  # fmt: skip

#: other kernels and orders of summation than transformers'; logits are up to 10
TOLERANCE = 1e-4
PROPERTY = settings(max_examples=30, deadline=None, derandomize=True)


@dataclass
class Compiled:
    """Materialised graphs of one model and prune set."""

    prefill: fx.GraphModule
    decode: fx.GraphModule
    #: prefill before the boundary token got its way: every token is a context token
    context: fx.GraphModule


@cache
def traced(name: str) -> tuple[PreTrainedModel, Program]:
    """transformers' module, and its program up to the stage split."""
    program = trace(copy.deepcopy(CONFIGS[name]))
    PassManager(transformations([])[:4]).run(program)
    return tiny_model(CONFIGS[name]), program


@cache
def compiled(name: str, pruned: frozenset[int]) -> Compiled:
    model, source = traced(name)
    program = source.clone()
    passes = transformations(pruned)
    weights = model.state_dict()
    PassManager(passes[4:7]).run(program)
    context = materialise(program.graphs["prefill"], program, weights)
    PassManager(passes[7:]).run(program)
    prefill, decode = (materialise(program.graphs[stage], program, weights) for stage in ("prefill", "decode"))
    return Compiled(prefill, decode, context)


@st.composite
def models(draw: st.DrawFn) -> tuple[str, frozenset[int]]:
    """A config and the layers to prune: none, all, or any others."""
    name = draw(st.sampled_from(sorted(CONFIGS)))
    layers = range(CONFIGS[name].num_hidden_layers)
    return name, frozenset(layer for layer in layers if draw(st.booleans()))


def batches(shortest: int = 1) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(shortest, 12), min_size=1, max_size=3)


PASTS = st.sampled_from([0, 0, 1, 5])
SEEDS = st.integers(0, 1000)


def assert_rows(
    inputs: Inputs, logits: Tensor, kv: list[Tensor], row: int, expected: tuple[Tensor, list[Tensor]]
) -> None:
    """The boundary token's logits, and every valid slot of every cache."""
    torch.testing.assert_close(logits[row], expected[0][0, -1:], rtol=0, atol=TOLERANCE, msg=lambda m: f"logits: {m}")
    slots = inputs.valid_slots[row]
    for i, (ours, theirs) in enumerate(zip(kv, expected[1], strict=True)):
        what = f"present.{i // 2}.{'value' if i % 2 else 'key'}"
        assert theirs.shape[2] == slots
        torch.testing.assert_close(
            ours[row, :, :slots], theirs[0], rtol=0, atol=TOLERANCE, msg=lambda m, w=what: f"{w}: {m}"
        )


def reference(model: PreTrainedModel, inputs: Inputs, row: int, pruned: Iterable[int]) -> tuple[Tensor, list[Tensor]]:
    """One row alone, without padding."""
    ids = inputs.ids[row : row + 1, : inputs.lengths[row]]
    logits, kv = pop_prefill(model, ids, pruned, inputs.cache(row))
    return logits, [t for layer in kv.layers for t in (layer.keys, layer.values)]


@PROPERTY
@given(models(), batches(), PASTS, SEEDS)
def test_prefill_is_the_reference(chosen: tuple[str, frozenset[int]], lengths: list[int], past: int, seed: int) -> None:
    name, pruned = chosen
    model, _ = traced(name)
    inputs = make_inputs(model, lengths, past, seed)
    logits, kv = run_graph(compiled(name, pruned).prefill, inputs)
    assert logits.shape == (len(lengths), 1, model.config.vocab_size)
    for row in range(len(lengths)):
        assert_rows(inputs, logits, kv, row, reference(model, inputs, row, pruned))


@PROPERTY
@given(st.sampled_from(sorted(CONFIGS)), st.booleans(), batches(), PASTS, SEEDS)
def test_pruning_nothing_or_the_last_layer_changes_no_logit(
    name: str, prune_last: bool, lengths: list[int], past: int, seed: int
) -> None:
    """Nothing reads the last layer's output for a context token."""
    model, _ = traced(name)
    pruned = frozenset([CONFIGS[name].num_hidden_layers - 1] if prune_last else [])
    inputs = make_inputs(model, lengths, past, seed)
    logits, kv = run_graph(compiled(name, pruned).prefill, inputs)
    for row, length in enumerate(lengths):
        full = transformers_forward(model, inputs.ids[row : row + 1, :length], inputs.cache(row))
        assert_rows(inputs, logits, kv, row, full)  # nor any key or value: the last layer's come from its true input


@PROPERTY
@given(models(), batches(shortest=2), PASTS, SEEDS)
def test_the_two_formulations_agree(
    chosen: tuple[str, frozenset[int]], lengths: list[int], past: int, seed: int
) -> None:
    """One prefill graph = the context tokens' prefill, then one step of the decode graph on the boundary token."""
    name, pruned = chosen
    model, _ = traced(name)
    graphs = compiled(name, pruned)
    inputs = make_inputs(model, lengths, past, seed)
    logits, kv = run_graph(graphs.prefill, inputs)
    context_lengths = [n - 1 for n in lengths]
    _, context_kv = run_graph(graphs.context, without_boundary(inputs, context_lengths))
    boundary = torch.stack([inputs.ids[row, n - 1 : n] for row, n in enumerate(lengths)])
    step = Inputs(boundary, inputs.mask, context_kv, [1] * len(lengths))
    step_logits, step_kv = run_graph(graphs.decode, step)
    for row, slots in enumerate(inputs.valid_slots):
        one_row = step_logits[row : row + 1], [t[row : row + 1, :, :slots] for t in step_kv]
        assert_rows(inputs, logits, kv, row, one_row)


def without_boundary(inputs: Inputs, lengths: list[int]) -> Inputs:
    past = inputs.mask.shape[1] - inputs.ids.shape[1]
    longest = max(lengths)
    mask = (torch.arange(past + longest)[None] < past + torch.tensor(lengths)[:, None]).long()
    return Inputs(inputs.ids[:, :longest], mask, inputs.past, lengths)


@PROPERTY
@given(models(), batches(), st.integers(1, 3), SEEDS)
def test_decoding_after_prefill_is_the_reference(
    chosen: tuple[str, frozenset[int]], lengths: list[int], steps: int, seed: int
) -> None:
    """Rows of unequal length go on in one batch, each token at its own row's next slot."""
    name, pruned = chosen
    model, _ = traced(name)
    graphs = compiled(name, pruned)
    inputs = make_inputs(model, lengths, 0, seed)
    logits, kv = run_graph(graphs.prefill, inputs)
    answers = torch.randint(64, (len(lengths), steps), generator=torch.Generator().manual_seed(seed))
    valid = torch.tensor(lengths)
    for step in range(steps):
        valid += 1
        mask = (torch.arange(kv[0].shape[2] + 1)[None] < valid[:, None]).long()
        now = Inputs(answers[:, step : step + 1], mask, kv, [1] * len(lengths))
        logits, kv = run_graph(graphs.decode, now)
    for row, length in enumerate(lengths):
        _, reference_kv = pop_prefill(model, inputs.ids[row : row + 1, :length], pruned)
        expected = transformers_forward(model, answers[row : row + 1], reference_kv)
        assert_rows(now, logits, kv, row, expected)
