"""Calibration of a decoder to which image features are added between layers: what is added is neither lost nor learned.

The model is Qwen3-VL's text decoder of 6 layers, with features behind layers 0 and 1.
"""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace
from functools import cache

import pytest
import torch
import vision_reference as reference
from conftest import materialise
from torch import Tensor
from transformers import DynamicCache
from vision_reference import Given, Visual, given_of, make_prompt

from popcompile.frontend.tracing import trace
from popcompile.passes import PassManager, Program, canonicalization, pruning
from popcompile.pruning.costs import layer_table
from popcompile.pruning.hidden_states import HiddenStates
from popcompile.pruning.layerwise import LayerwiseModel, Tokens
from popcompile.pruning.plan import predicted_speedup
from popcompile.pruning.pruned_prefill import Prompts, last_hidden_state
from popcompile.pruning.regression import Calibration, calibrate
from popcompile.pruning.rows import ImageTokens, Rows, decoder_inputs
from popcompile.vision.tracing import build_model, trace_images

CONFIG = reference.qwen3_vl()
MODEL = cache(lambda: reference.random_model(deepcopy(CONFIG)))
PARTS: list[reference.Part] = [2, Visual(4, 6), 3, Visual(8, 4), 4]
#: features are added between the first two. Layer 0 is not among them: equal tokens are equal vectors before it
PRUNED = (1, 2, 4)
TOLERANCE = 1e-4


@cache
def canonical() -> Program:
    program = trace(deepcopy(CONFIG))
    program.add(trace_images(build_model(deepcopy(CONFIG))))
    PassManager(canonicalization()).run(program)
    return program


@cache
def layers() -> LayerwiseModel:
    program, weights = canonical(), MODEL().state_dict()
    return LayerwiseModel(
        materialise(program.graphs["model"], program, weights), decoder_inputs(program, weights.__getitem__)
    )


@cache
def prompt() -> Given:
    return given_of(MODEL(), make_prompt(PARTS))


def rows_of(given: Given) -> Rows:
    """The prompt's ids, and what the vision tower makes of its images, for the places of these."""
    index = torch.where(given.visual, given.visual.cumsum(1) - 1, -1)
    return Rows(make_prompt(PARTS).ids, ImageTokens(given.wide[given.visual], index, given.positions))


def tokens_of(begin: int = 0, end: int | None = None) -> Tokens:
    rows = rows_of(prompt())
    return layers().tokens(rows, rows.slots[:, begin:end])


def causal(count: int) -> Tensor:
    return torch.ones(1, count, count, dtype=torch.bool).tril()


def prefill(pruned: tuple[int, ...], calibration: Calibration, window: int = 1) -> tuple[Tensor, list[Tensor]]:
    """The boundary token's logits and the cache, by the prefill graph."""
    program, given = canonical().clone(), prompt()
    program.constants |= calibration.constants()
    PassManager(pruning(pruned, calibration.projections, calibration.bypasses, window)).run(program)
    gm = materialise(program.graphs["prefill"], program, MODEL().state_dict())
    mask = torch.ones(given.wide.shape[:2], dtype=torch.int64)
    with torch.no_grad():
        logits, *cache = gm(given.wide, mask, given.positions, *[torch.zeros(1, 2, 0, 16)] * 12)
    return logits, cache


def difference(ours: Tensor, theirs: Tensor) -> float:
    return float((ours - theirs).abs().max() / theirs.abs().max())


@torch.no_grad()
def test_layer_by_layer_is_the_model() -> None:
    tokens = tokens_of()
    x = layers().embed(tokens)
    assert torch.equal(x, prompt().embeddings)
    for layer in range(layers().num_layers):
        x = layers().layer(layer, x, tokens, causal(x.shape[1]))
    expected = reference.full_logits(MODEL(), make_prompt(PARTS))
    assert difference(layers().logits(x, tokens), expected) < TOLERANCE
    rows = rows_of(prompt())
    assert rows.images is not None
    by_slot = replace(rows.images, position_ids=rows.slots.expand(3, -1, -1))
    text = layers().tokens(replace(rows, images=by_slot), rows.slots)
    y = layers().layer(0, layers().embed(text), text, causal(x.shape[1]))
    assert difference(y, layers().layer(0, layers().embed(tokens), tokens, causal(x.shape[1]))) > 0.01


@torch.no_grad()
def test_what_is_handed_on_has_the_features() -> None:
    given, tokens = prompt(), tokens_of()
    for layer in range(6):
        x = torch.randn(given.embeddings.shape, generator=torch.Generator().manual_seed(layer))
        added = given.features[layer] if layer < 2 else torch.zeros(())
        assert layers().adds_behind(layer) == (layer < 2)
        assert torch.equal(layers().hand_on(layer, x, tokens), x + added)
    assert layers().runs([0, 1, 2, 3, 5]) == [(0, 0), (1, 1), (2, 3), (5, 5)]


@pytest.mark.parametrize("window", [1, 5])
@torch.no_grad()
def test_pruned_prefill_before_it_is_compiled_is_the_graph(window: int) -> None:
    """With maps and bypasses, and what refinement runs."""
    given = prompt()
    count = given.wide.shape[1] - window
    context, tail = given.part(0, count), given.part(count)
    rows = rows_of(given)
    positions = rows.slots[:, count:]
    prompts = Prompts.of(layers(), rows, count, positions, torch.full_like(positions, count))
    found = []
    for maps in (Calibration(), fitted(PRUNED)):
        entering = (context.embeddings, tail.embeddings)
        y = last_hidden_state(layers(), prompts, entering, 0, list(PRUNED), maps)
        found.append(layers().logits(y, prompts.tail)[:, -1:])
        assert difference(found[-1], prefill(PRUNED, maps, window)[0]) < TOLERANCE
    assert difference(*found) > 0.01


@cache
def fitted(pruned: tuple[int, ...], bypass: bool = True) -> Calibration:
    """To a prompt with fewer tokens than a hidden state has features: on it maps make what layers do."""
    with torch.no_grad():
        states = HiddenStates(layers(), rows_of(prompt()), 0)
        return calibrate(states, list(pruned), bypass=bypass, ridge=1e-9)


@torch.no_grad()
def test_a_bypass_learns_what_layers_add() -> None:
    """And not the features behind them, which are added to it: the kept layers after it then read what they did."""
    pruned = (1, 4)
    assert set(fitted(pruned).bypasses) == {1, 4}
    expected = reference.full_logits(MODEL(), make_prompt(PARTS))[:, -1:]
    assert difference(prefill(pruned, fitted(pruned))[0], expected) < 1e-2
    assert difference(prefill(pruned, Calibration())[0], expected) > 0.1


@torch.no_grad()
def test_projections_read_the_features_of_the_layers_before_them() -> None:
    """Without bypasses the maps of all runs make the cache entries of the whole model."""
    kv = DynamicCache()
    reference.forward(MODEL(), prompt(), kv)
    maps = fitted(PRUNED, bypass=False)
    assert not maps.bypasses and set(maps.projections) == {2, 4}  # layer 1 has its own, of its own input
    cache, own = (prefill(PRUNED, m)[1] for m in (maps, Calibration()))
    for layer in PRUNED:
        for entry, expected in enumerate((kv.layers[layer].keys, kv.layers[layer].values)):
            context = expected[:, :, :-1]
            assert difference(cache[2 * layer + entry][:, :, :-1], context) < 1e-2
            assert layer == 1 or difference(own[2 * layer + entry][:, :, :-1], context) > 0.1


def test_reports_know_the_runs() -> None:
    program = canonical().clone()
    PassManager(pruning([0, 1, 2, 3])).run(program)
    sources = [row["kv_from"] for row in layer_table(program, [0, 1, 2, 3], 1)]
    assert sources == [f"own projection of x entering layer {i}" for i in (0, 1, 2, 2)] + ["its own layer"] * 2
    with_bypasses, without = (predicted_speedup(canonical(), bypass, 1024) for bypass in (True, False))
    costs = [1 / with_bypasses(pruned, 1) - 1 / without(pruned, 1) for pruned in ([3, 4], [0, 1, 2])]
    assert costs[1] == pytest.approx(3 * costs[0])  # a bypass for each of the layers that features follow
