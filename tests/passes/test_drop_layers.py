"""Layers dropped from a stage: the model is the one that transformers computes with those layers taken out."""

from __future__ import annotations

import copy

import pytest
import torch
from conftest import (
    Inputs,
    cache_tensors,
    make_inputs,
    materialise,
    run_graph,
    tiny_gemma3,
    tiny_llama,
    tiny_model,
)
from reference import without_layers
from torch import Tensor
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from popcompile.frontend.tracing import trace
from popcompile.passes import ContractError, PassManager, Program, canonicalization, ops
from popcompile.passes.drop_layers import DropLayers
from popcompile.passes.graph import find, outputs_of
from popcompile.passes.printing import print_graph
from popcompile.passes.split_stages import SplitStages

#: sums in another order: no more than single precision's rounding
TOLERANCE = 1e-4

MODELS = {
    "llama, inner": (tiny_llama(num_hidden_layers=4), [1, 2]),
    "llama, first and last": (tiny_llama(num_hidden_layers=4), [0, 3]),
    "gemma3, a sliding one": (tiny_gemma3(), [0]),
    "gemma3, last two": (tiny_gemma3(), [1, 2]),
    "none": (tiny_llama(), []),
}


def split_program(config: PreTrainedConfig) -> Program:
    """A traced program after the stage split."""
    program = trace(copy.deepcopy(config))
    PassManager([*canonicalization(), SplitStages()]).run(program)
    return program


@torch.no_grad()
def expected(model: PreTrainedModel, inputs: Inputs, dropped: list[int]) -> tuple[Tensor, list[Tensor]]:
    """Logits of one row's tokens and the kept layers' cache."""
    cache, length = DynamicCache(), int(inputs.mask.sum())
    past = length - inputs.ids.shape[1]
    kept = [i for i in range(model.config.num_hidden_layers) if i not in dropped]
    for index, layer in enumerate(kept):
        key, value = (t[:, :, :past] for t in inputs.past[2 * layer : 2 * layer + 2])
        cache.update(key, value, index)
    logits = without_layers(model, dropped)(input_ids=inputs.ids, past_key_values=cache, use_cache=True).logits
    return logits, cache_tensors(cache)


@pytest.mark.parametrize("kind", MODELS)
def test_equals_transformers_without_the_layers(kind: str) -> None:
    config, dropped = MODELS[kind]
    model = tiny_model(config)
    program = split_program(config)
    (record,) = PassManager([DropLayers(dropped)]).run(program)
    assert record.matches == 2 * len(dropped)
    for stage, gm in program.graphs.items():
        graph = materialise(gm, program, model.state_dict())
        for tokens, past in ((13, 0), (4, 9), (1, 12)):
            inputs = make_inputs(model, [tokens], past)
            logits, cache = run_graph(graph, inputs)
            wanted, wanted_cache = expected(model, inputs, dropped)
            torch.testing.assert_close(logits, wanted, atol=TOLERANCE, rtol=0, msg=lambda m, s=stage: f"{s}: {m}")
            assert len(cache) == 2 * config.num_hidden_layers
            kept = [t for i in range(config.num_hidden_layers) if i not in dropped for t in cache[2 * i : 2 * i + 2]]
            for one, other in zip(kept, wanted_cache, strict=True):
                torch.testing.assert_close(one, other, atol=TOLERANCE, rtol=0)
    if dropped:  # the test would notice a layer that stays
        full = expected(model, inputs, [])[0]
        assert (full - logits).abs().max() > 100 * TOLERANCE


def test_a_dropped_layer_leaves_only_its_cache_entries() -> None:
    program = split_program(tiny_llama(num_hidden_layers=3))
    before = {stage: len(outputs_of(gm)) for stage, gm in program.graphs.items()}
    flops = PassManager([DropLayers([1])]).run(program)[0]
    for stage, gm in program.graphs.items():
        assert len(outputs_of(gm)) == before[stage]
        text = print_graph(gm, stage)
        assert "model.layers.1.self_attn.k_proj" in text
        for part in ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "post_attention_layernorm"):
            assert f"model.layers.1.{part}" not in text and f"model.layers.2.{part}" in text
        assert [n.meta["layer"] for n in find(gm, op=ops.attention)] == [0, 2]
        assert flops.flops_after[stage] < flops.flops_before[stage]


@pytest.mark.parametrize(
    ("layers", "words"), [([0, 1, 2], "at least one layer"), ([3], r"asked to drop \[3\]"), ([-1], r"drop \[-1\]")]
)
def test_layers_that_cannot_be_dropped(layers: list[int], words: str) -> None:
    with pytest.raises(ContractError, match=words):
        PassManager([DropLayers(layers)]).run(split_program(tiny_llama(num_hidden_layers=3)))


def test_dropping_twice_is_refused() -> None:
    program = split_program(tiny_llama(num_hidden_layers=3))
    PassManager([DropLayers([1])]).run(program)
    with pytest.raises(ContractError, match="missing already"):
        PassManager([DropLayers([2])]).run(program)
