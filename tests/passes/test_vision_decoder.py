"""The text decoder of vision-language models through every pass, against transformers' own modules, in fp32.

Qwen3-VL adds DeepStack's image features between its first layers and interleaves the sections of M-RoPE; Qwen2.5-VL
adds none and has them in chunks.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import vision_reference as reference
from calibrated import random_maps, reference_maps
from compiled_decoder import CompiledDecoder, difference, empty_cache, run_decoder, run_session
from conftest import cache_tensors, materialise
from steps import GRAPHS, numbered
from torch import Tensor, fx
from torch.nn.functional import pad
from transformers import AutoConfig, PreTrainedModel
from vision_reference import HIDDEN, LAYERS, Given, Visual, given_of, make_prompt, next_token, qwen2_5_vl, qwen3_vl

from popcompile.frontend.tracing import trace
from popcompile.passes import (
    ContractError,
    InsertVirtualGates,
    PassManager,
    Program,
    canonicalization,
    lowering,
    ops,
    pruning,
)
from popcompile.passes.drop_layers import DropLayers
from popcompile.passes.fuse_rotary_embedding import _axis_of_each_pair
from popcompile.passes.graph import find
from popcompile.passes.layers import runs_of
from popcompile.passes.printing import print_graph
from popcompile.passes.prune_lm_head import PruneLMHead
from popcompile.passes.split_stages import SplitStages

CONFIGS = {"qwen3_vl": qwen3_vl(), "qwen2_5_vl": qwen2_5_vl(num_hidden_layers=4)}
DECODERS = {family: CompiledDecoder(config) for family, config in CONFIGS.items()}
SMALL, WIDE, TALL = Visual(4, 4), Visual(4, 6), Visual(8, 4)
PROMPTS: dict[str, list[reference.Part]] = {
    "no image": [9],
    "an image": [3, WIDE, 5],
    "two equal": [3, SMALL, 2, SMALL, 4],
    "two of different size": [2, WIDE, 3, TALL, 4],
    "image first": [WIDE, 5],
    "image last": [4, WIDE],
    "adjacent": [2, SMALL, WIDE, 3],
    "video of two frames": [2, Visual(4, 6, frames=2, video=True), 4],
    "image and video": [2, SMALL, 3, Visual(4, 4, frames=2, video=True), 4],
}
#: of what is largest in a tensor; sums run in another order than transformers'
TOLERANCE = 1e-4


def model_of(family: str) -> PreTrainedModel:
    return DECODERS[family].model


def canonical(family: str) -> Program:
    return DECODERS[family].canonical


@cache
def given(family: str, prompt: str) -> Given:
    return given_of(model_of(family), make_prompt(PROMPTS[prompt]))


def graph(family: str, stage: str, pruned: tuple[int, ...] = (), window: int = 1) -> fx.GraphModule:
    return DECODERS[family].graph(stage, pruned, window)


def inputs_of(tokens: Given, cache: Sequence[Tensor]) -> list[Tensor]:
    """What a graph is given of one row, after a cache."""
    total = cache[0].shape[2] + tokens.embeddings.shape[1]
    return [tokens.wide, torch.ones(1, total, dtype=torch.int64), tokens.positions, *cache]


def run(gm: fx.GraphModule, tokens: Given, cache: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    return run_decoder(gm, inputs_of(tokens, cache))


# --- tracing and RoPE --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("family", "features"), [("qwen3_vl", 2), ("qwen2_5_vl", 0)])
def test_inputs(family: str, features: int) -> None:
    program = canonical(family)
    assert program.inputs == ["inputs_embeds", "attention_mask", "position_ids"]
    shapes = [tuple(n.meta["val"].shape) for n in program.graphs["model"].graph.nodes if n.op == "placeholder"][:3]
    assert shapes[0][2] == (1 + features) * HIDDEN and shapes[2][0] == 3
    assert shapes[0][:2] == shapes[2][1:] and shapes[0][0] == shapes[1][0]
    assert program.max_positions == 128
    assert all(name.startswith(("model.language_model.", "lm_head")) for name in program.constants)


@pytest.mark.parametrize(
    ("family", "axes"), [("qwen3_vl", [0, 1, 2, 0, 1, 2, 0, 0]), ("qwen2_5_vl", [0, 0, 1, 1, 1, 2, 2, 2])]
)
def test_axes_are_the_sections(family: str, axes: list[int]) -> None:
    """Interleaved and chunked, found without being told; one table for all layers, of initializers."""
    program = canonical(family)
    found = find(program.graphs["model"], op=ops.rotary_embedding_axes)
    assert len(found) == 2 * program.num_layers and {tuple(n.args[4]) for n in found} == {tuple(axes)}
    assert len({n.args[1:4] for n in found}) == 1
    assert not find(program.graphs["model"], op=ops.rotary_embedding)


@pytest.mark.parametrize("seed", range(5))
def test_axes_of_any_order_are_found(seed: int) -> None:
    random = torch.Generator().manual_seed(seed)
    axes = torch.randint(4, (12,), generator=random)
    frequencies = 10000.0 ** -(torch.arange(12) / 12)

    def rotations(positions: Tensor) -> Tensor:
        angles = positions[axes].T * frequencies
        return torch.stack((angles.cos(), angles.sin()))

    def of_two(positions: Tensor) -> Tensor:
        return rotations(positions) + rotations(positions.flip(0)) * (torch.arange(12) == 3)

    assert _axis_of_each_pair(rotations, 4, 1000) == axes.tolist()
    assert _axis_of_each_pair(of_two, 4, 1000) is None


def without_images(family: str) -> dict[str, Any]:
    """The text decoder's sizes, for a model of text alone."""
    text = CONFIGS[family].text_config.to_dict()
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "max_position_embeddings", "head_dim", "rms_norm_eps",
    )  # fmt: skip
    rope = {"rope_type": "default", "rope_theta": text["rope_parameters"]["rope_theta"]}
    return {name: text[name] for name in names if name in text} | {"rope_parameters": rope}


@pytest.mark.parametrize(("family", "text_type"), [("qwen3_vl", "qwen3"), ("qwen2_5_vl", "qwen2")])
def test_text_alone_is_the_text_model_bit_for_bit(family: str, text_type: str) -> None:
    """The same weights in a model whose RoPE has one position, its graph compiled as ever, and given token ids."""
    text = trace(AutoConfig.for_model(text_type, tie_word_embeddings=False, **without_images(family)))
    PassManager([*canonicalization(), *pruning((1, 2))]).run(text)
    assert len(find(text.graphs["decode"], op=ops.rotary_embedding)) == 2 * text.num_layers
    weights = {name.replace("model.language_model.", "model."): t for name, t in model_of(family).state_dict().items()}
    ids, tokens = make_prompt(PROMPTS["no image"]).ids, given(family, "no image")
    mask, cache = torch.ones_like(ids), empty_cache(text)
    for stage in ("decode", "prefill"):
        with torch.no_grad():
            expected = materialise(text.graphs[stage], text, weights)(ids, mask, *cache)
        logits, present = run(graph(family, stage, (1, 2)), tokens, cache)
        assert all(torch.equal(a, b) for a, b in zip((logits, *present), expected, strict=True))
    moved = Given(tokens.embeddings, tokens.features, tokens.positions + 1, tokens.visual, 0)
    assert not torch.equal(run(graph(family, "prefill", (1, 2)), moved, cache)[1][0], expected[1])


@pytest.mark.parametrize(
    "name", ["FuseRotaryEmbedding.model", "InsertBoundaryRecompute.prefill", "GatherRotaryRows.decode"]
)
def test_graph_after(name: str, request: pytest.FixtureRequest) -> None:
    """As text: three layers, features behind the first, of which the first two are pruned."""
    program = trace(qwen3_vl([0], num_hidden_layers=3))
    compiler_pass, stage = name.split(".")
    passes = [*canonicalization(), *pruning((0, 1)), *lowering()]
    last = next(i for i, p in enumerate(passes) if p.name == compiler_pass)
    PassManager(passes[: last + 1]).run(program)
    text, file = print_graph(program.graphs[stage], stage), GRAPHS / f"vision-{name}.txt"
    if request.config.getoption("--update-graphs"):
        file.write_text(text, encoding="utf-8")
    assert numbered(text).splitlines() == numbered(file.read_text(encoding="utf-8")).splitlines()


# --- the whole model ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "prompt"),
    [*(("qwen3_vl", p) for p in PROMPTS), *(("qwen2_5_vl", p) for p in ("an image", "two of different size"))],
)
def test_decode_graph_is_the_model(family: str, prompt: str) -> None:
    """From ids and pixels in transformers, from what its vision tower made of them here."""
    expected = reference.full_logits(model_of(family), make_prompt(PROMPTS[prompt]))
    logits, _ = run(graph(family, "decode"), given(family, prompt), empty_cache(canonical(family)))
    assert difference([logits], [expected]) < TOLERANCE


def test_what_the_decoder_is_given_matters() -> None:
    """So that agreement says something: DeepStack's features, each layer's own, and each axis of the positions."""
    tokens, cache = given("qwen3_vl", "two of different size"), empty_cache(canonical("qwen3_vl"))
    expected = reference.full_logits(model_of("qwen3_vl"), make_prompt(PROMPTS["two of different size"]))
    slots = torch.arange(tokens.embeddings.shape[1])
    others = [Given(tokens.embeddings, [f * 0 for f in tokens.features], tokens.positions, tokens.visual, 0)]
    others.append(Given(tokens.embeddings, tokens.features[::-1], tokens.positions, tokens.visual, 0))
    for axis in range(3):
        others.append(Given(tokens.embeddings, tokens.features, tokens.positions.clone(), tokens.visual, 0))
        others[-1].positions[axis] = slots
    for other in others:
        logits, _ = run(graph("qwen3_vl", "decode"), other, cache)
        assert difference([logits], [expected]) > 0.01


# --- pruned prefill ----------------------------------------------------------------------------------------------

#: layers 0 and 1 have DeepStack behind them
PRUNED = [(), (0,), (1,), (0, 1), (1, 2), (3, 4), (0, 1, 2, 3), (1, 3, 5), tuple(range(LAYERS))]


def test_runs_end_where_features_are_added() -> None:
    gm = canonical("qwen3_vl").graphs["model"]
    assert runs_of(gm, range(LAYERS)) == [(0, 0), (1, 1), (2, 5)]
    assert runs_of(gm, [1, 2, 4]) == [(1, 1), (2, 2), (4, 4)]
    assert runs_of(canonical("qwen2_5_vl").graphs["model"], range(4)) == [(0, 3)]


@pytest.mark.parametrize("window", [1, 5, 64])
@pytest.mark.parametrize("pruned", PRUNED)
def test_pruned_prefill_is_the_reference(pruned: tuple[int, ...], window: int) -> None:
    """Then five tokens, whose positions are not their slots. A window beyond the prompt is the whole model."""
    prompts = ("two of different size", "image last", "video of two frames") if window < 64 else ("an image",)
    for prompt in prompts:
        require_reference("qwen3_vl", prompt, pruned, window)


@pytest.mark.parametrize("pruned", [(0,), (1, 2), (0, 1, 2, 3)])
def test_pruned_prefill_without_deepstack(pruned: tuple[int, ...]) -> None:
    for window in (1, 5):
        require_reference("qwen2_5_vl", "two of different size", pruned, window)


def require_reference(family: str, prompt: str, pruned: tuple[int, ...], window: int) -> None:
    model, tokens, steps = model_of(family), given(family, prompt), []
    expected, kv = reference.pop_prefill(model, tokens, pruned, window=window)
    prefill, decode = graph(family, "prefill", pruned, window), graph(family, "decode", pruned, window)
    logits, cache = run(prefill, tokens, empty_cache(canonical(family)))
    steps.append(difference([logits, *cache], [expected, *cache_tensors(kv)]))
    assert tokens.delta != 0
    for _ in range(5):
        token = next_token(model, int(expected[0, -1].argmax()), cache[0].shape[2], tokens)
        expected = reference.forward(model, token, kv)
        logits, cache = run(decode, token, cache)
        steps.append(difference([logits, *cache], [expected, *cache_tensors(kv)]))
    assert max(steps) < TOLERANCE


@pytest.mark.parametrize("pruned", [(0,), (0, 1), (1, 3, 5)])
def test_pruning_changes_what_follows(pruned: tuple[int, ...]) -> None:
    """Of the whole model, and of one that loses features behind a pruned layer."""
    model, tokens = model_of("qwen3_vl"), given("qwen3_vl", "two of different size")
    logits, _ = reference.pop_prefill(model, tokens, pruned)
    lost = [torch.zeros_like(f) if layer in pruned else f for layer, f in enumerate(tokens.features)]
    without = Given(tokens.embeddings, lost, tokens.positions, tokens.visual, tokens.delta)
    for other in (reference.pop_prefill(model, tokens, ())[0], reference.pop_prefill(model, without, pruned)[0]):
        assert difference([logits], [other]) > 0.01


@pytest.mark.parametrize("window", [1, 5])
def test_calibrated_maps_and_bypasses(window: int) -> None:
    """Maps of every pruned layer, and a bypass of each run, two of which features follow."""
    model, tokens = model_of("qwen3_vl"), given("qwen3_vl", "two of different size")
    pruned, runs = (0, 1, 2, 4), {0: 0, 1: 1, 2: 2, 4: 4}
    calibration = random_maps(model.model.language_model, pruned, runs, seed=1)
    program = canonical("qwen3_vl").clone()
    program.constants |= calibration.constants()
    PassManager(pruning(pruned, pruned, runs, window)).run(program)
    prefill = materialise(program.graphs["prefill"], program, model.state_dict())
    logits, cache = run(prefill, tokens, empty_cache(program))
    projections, bypasses = reference_maps(calibration)
    at_ends = {runs[first]: bypass for first, bypass in bypasses.items()}
    expected, kv = reference.pop_prefill(
        model, tokens, pruned, window=window, projections=projections, bypasses=at_ends
    )
    assert difference([logits, *cache], [expected, *cache_tensors(kv)]) < TOLERANCE
    for other in ({"projections": projections}, {"bypasses": at_ends}):
        assert difference([logits], [reference.pop_prefill(model, tokens, pruned, window=window, **other)[0]]) > 0.01


def test_a_bypass_begins_where_a_run_does() -> None:
    """Layers 1 and 2 are in two runs, for features are added between them; 2 and 3 are in one."""
    PassManager(pruning((1, 2, 3), bypassed=(1, 2))).run(canonical("qwen3_vl").clone())
    with pytest.raises(ContractError, match=r"no run of pruned layers begins at \[3\]"):
        PassManager(pruning((1, 2, 3), bypassed=(3,))).run(canonical("qwen3_vl").clone())


class Batch:
    """Rows of other images and lengths, padded on the right with what nobody may read, and what is expected of each."""

    def __init__(self, pruned: tuple[int, ...], window: int) -> None:
        rows = [given("qwen3_vl", prompt) for prompt in ("two of different size", "no image", "image last")]
        self.lengths = [row.embeddings.shape[1] for row in rows]
        spare = [max(self.lengths) - length for length in self.lengths]
        wide = [pad(row.wide, (0, 0, 0, more), value=9.0) for row, more in zip(rows, spare, strict=True)]
        positions = [pad(row.positions, (0, more), value=77) for row, more in zip(rows, spare, strict=True)]
        mask = (torch.arange(max(self.lengths))[None] < torch.tensor(self.lengths)[:, None]).long()
        empty = empty_cache(canonical("qwen3_vl"), len(rows))
        self.inputs = [torch.cat(wide), mask, torch.cat(positions, 1), *empty]
        self.expected = [reference.pop_prefill(model_of("qwen3_vl"), row, pruned, window=window) for row in rows]

    def require(self, logits: Tensor, cache: Sequence[Tensor]) -> None:
        for i, (length, (expected, kv)) in enumerate(zip(self.lengths, self.expected, strict=True)):
            ours = [logits[i : i + 1], *(t[i : i + 1, :, :length] for t in cache)]
            assert difference(ours, [expected, *cache_tensors(kv)]) < TOLERANCE


@pytest.mark.parametrize(("pruned", "window"), [((0, 1, 3), 1), ((0, 1, 3), 5), ((), 1)])
def test_batch_of_unequal_prompts(pruned: tuple[int, ...], window: int) -> None:
    batch = Batch(pruned, window)
    with torch.no_grad():
        logits, *cache = graph("qwen3_vl", "prefill", pruned, window)(*batch.inputs)
    batch.require(logits, cache)


# --- gates and dropped layers ------------------------------------------------------------------------------------


@pytest.mark.parametrize("pruned", [(), (0, 3), (1, 2)])
def test_closed_prefill_gates_prune(pruned: tuple[int, ...]) -> None:
    """A layer whose prefill gate is 0 adds nothing to context tokens, and the features behind it are added still."""
    program, tokens = canonical("qwen3_vl").clone(), given("qwen3_vl", "two of different size")
    PassManager([InsertVirtualGates()]).run(program)
    gated = materialise(program.graphs["model"], program, model_of("qwen3_vl").state_dict())
    gates = torch.ones(LAYERS, 2)
    gates[list(pruned), 0] = 0
    with torch.no_grad():
        logits, *cache = gated(*inputs_of(tokens, empty_cache(program)), gates)
    expected, kv = reference.pop_prefill(model_of("qwen3_vl"), tokens, pruned)
    assert difference([logits[:, -1:], *cache], [expected, *cache_tensors(kv)]) < TOLERANCE


@pytest.mark.parametrize("layers", [(0, 1, 3), (2, 3), (1, 2, 3)], ids=str)
def test_dropped_layers_keep_the_features_behind_them(layers: tuple[int, ...]) -> None:
    """transformers' module whose dropped layers hand their input on, for every token. The head may read what was added
    behind the last layer that is left.
    """
    program, tokens = canonical("qwen3_vl").clone(), given("qwen3_vl", "two of different size")
    PassManager([SplitStages(), DropLayers(layers), PruneLMHead()]).run(program)
    prefill, decode = (
        materialise(program.graphs[stage], program, model_of("qwen3_vl").state_dict())
        for stage in ("prefill", "decode")
    )
    model = deepcopy(model_of("qwen3_vl"))
    for layer in layers:
        model.model.language_model.layers[layer].register_forward_hook(lambda module, args, out: args[0])
    expected = reference.full_logits(model, make_prompt(PROMPTS["two of different size"]))
    assert difference([run(decode, tokens, empty_cache(program))[0]], [expected]) < TOLERANCE
    assert difference([run(prefill, tokens, empty_cache(program))[0]], [expected[:, -1:]]) < TOLERANCE


# --- in ONNX Runtime ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "pruned", "window"),
    [("qwen3_vl", (0, 1, 3, 4), 1), ("qwen3_vl", (1, 2, 5), 5), ("qwen3_vl", (), 1), ("qwen2_5_vl", (1, 2), 1)],
)
def test_onnx_graphs_compute_what_fx_graphs_do(
    family: str, pruned: tuple[int, ...], window: int, tmp_path: Path
) -> None:
    """Prompts of one and of several blocks of attention, and tokens after them."""
    onnx = DECODERS[family].sessions(tmp_path, pruned, window)
    names = [value.name for value in onnx["prefill"].get_inputs()]
    assert names[:4] == ["inputs_embeds", "attention_mask", "position_ids", "past_key_values.0.key"]
    images: list[reference.Part] = [3, Visual(16, 16), Visual(8, 12), 60]
    for parts in (PROMPTS["two of different size"], PROMPTS["image last"], PROMPTS["no image"], images):
        tokens = given_of(model_of(family), make_prompt(parts))
        empty = empty_cache(canonical(family))
        ours = run_session(onnx["prefill"], inputs_of(tokens, empty))
        theirs = run(graph(family, "prefill", pruned, window), tokens, empty)
        assert difference([ours[0], *ours[1]], [theirs[0], *theirs[1]]) < TOLERANCE
        whole = (
            run_session(onnx["decode"], inputs_of(tokens, empty)),
            run(graph(family, "decode", pruned, window), tokens, empty),
        )
        assert difference([whole[0][0], *whole[0][1]], [whole[1][0], *whole[1][1]]) < TOLERANCE
        for stage in ("decode", "prefill", "decode"):  # the prefill graph is the whole model for one token: unified
            token = next_token(model_of(family), int(theirs[0][0, -1].argmax()), ours[1][0].shape[2], tokens)
            ours = run_session(onnx[stage], inputs_of(token, ours[1]))
            theirs = run(graph(family, "decode", pruned, window), token, theirs[1])
            assert difference([ours[0], *ours[1]], [theirs[0], *theirs[1]]) < TOLERANCE


@pytest.mark.parametrize("window", [1, 5])
def test_batch_in_onnx(window: int, tmp_path: Path) -> None:
    """A row's tokens read their own rows of the tables."""
    batch = Batch((0, 1, 3), window)
    session = DECODERS["qwen3_vl"].sessions(tmp_path, (0, 1, 3), window)["prefill"]
    batch.require(*run_session(session, batch.inputs))


def test_onnx_gathers_rows_of_tables_once() -> None:
    """For all layers: of each table, for all tokens and for the boundary token's way through pruned layers."""
    program = DECODERS["qwen3_vl"].lowered((1, 3))
    for stage, positions in (("prefill", 2), ("decode", 1)):
        gm = program.graphs[stage]
        assert len(find(gm, op=ops.rotary_rows)) == len(find(gm, op=ops.token_rows)) == positions
        assert len(find(gm, op=torch.ops.aten.gather.default)) == 2 * positions
