"""Every pass keeps the meaning that it promises to keep: against transformers, the reference, and the graph before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import onnx_ir
import onnxruntime as ort
import pytest
import torch
from conftest import (
    Inputs,
    make_inputs,
    materialise,
    run_graph,
    tiny_gemma3,
    tiny_llama,
    tiny_model,
    transformers_forward,
)
from onnx_ir import Node
from reference import pop_prefill
from steps import Result, Step, assert_close, before, compile_in_steps, rows, run_onnx
from torch import Tensor
from transformers import PreTrainedModel

from popcompile.export.attention_graph import Shared
from popcompile.export.onnx_graph import to_onnx
from popcompile.export.providers import PROVIDERS

#: prompts of 9 and 4 tokens after 3, so that Gemma's window of 8 slides and one row is padded
LENGTHS, PAST = [9, 4], 3
CONFIGS = {"llama": tiny_llama(), "gemma3": tiny_gemma3()}
#: GroupQueryAttention rotates no heads of 8 features
SMALL_HEADS = {f"{family}, small heads": config(head_dim=8) for family, config in
               (("llama", tiny_llama), ("gemma3", tiny_gemma3))}  # fmt: skip
PRUNED = {family: [1] for family in [*CONFIGS, *SMALL_HEADS]}


@cache
def compiled(family: str) -> tuple[PreTrainedModel, dict[str, Step]]:
    config = (CONFIGS | SMALL_HEADS)[family]
    return tiny_model(config), compile_in_steps(config, PRUNED[family])


def run_step(family: str, name: str, stage: str, inputs: Inputs) -> Result:
    model, steps = compiled(family)
    program = steps[name].program
    gm = program.graphs.get(stage) or program.graphs["model"]
    return run_graph(materialise(gm, program, model.state_dict()), inputs)


@cache
def prompts(family: str) -> Inputs:
    return make_inputs(compiled(family)[0], LENGTHS, PAST)


def full_model(model: PreTrainedModel, inputs: Inputs) -> list[list[Tensor]]:
    """Every row alone, unpadded, through transformers' module."""
    found = []
    for i, n in enumerate(inputs.lengths):
        logits, kv = transformers_forward(model, inputs.ids[i : i + 1, :n], inputs.cache(i))
        found.append([logits[0], *(t[0] for t in kv)])
    return found


def pop(model: PreTrainedModel, inputs: Inputs, pruned: Iterable[int]) -> list[list[Tensor]]:
    """Every row alone, unpadded, through the reference; logits of the boundary token."""
    found = []
    for i, n in enumerate(inputs.lengths):
        logits, kv = pop_prefill(model, inputs.ids[i : i + 1, :n], pruned, inputs.cache(i))
        found.append([logits[0], *(t[0] for layer in kv.layers for t in (layer.keys, layer.values))])
    return found


FULL = {
    "Traced": ["model"],
    "Normalize": ["model"],
    "FuseRMSNorm": ["model"],
    "FuseRotaryEmbedding": ["model"],
    "AnnotateLayers": ["model"],
    "SplitStages": ["prefill", "decode"],
    "Cleanup": ["decode"],  # what prunes prefill leaves decode alone
}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(("name", "stage"), [(name, stage) for name, stages in FULL.items() for stage in stages])
def test_full_graph_is_the_model(family: str, name: str, stage: str) -> None:
    inputs = prompts(family)
    ours = rows(inputs, run_step(family, name, stage, inputs))
    # transformers attends without our mask, in another order of summation
    assert_close(ours, full_model(compiled(family)[0], inputs), 1e-5)


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize(
    ("name", "stage"),
    [
        ("Normalize", "model"),
        ("FuseRMSNorm", "model"),
        ("FuseRotaryEmbedding", "model"),
        ("AnnotateLayers", "model"),
        ("SplitStages", "prefill"),
        ("SplitStages", "decode"),
        ("InsertKVProjection", "prefill"),
        ("PruneLMHead", "decode"),
        ("Cleanup", "prefill"),
        ("Cleanup", "decode"),
    ],
)
def test_pass_changes_no_bit(family: str, name: str, stage: str) -> None:
    """The same arithmetic in the same order, padding included."""
    inputs = prompts(family)
    logits, kv = run_step(family, name, stage, inputs)
    logits_before, kv_before = run_step(family, before(compiled(family)[1], name).name, stage, inputs)
    for a, b in zip([logits, *kv], [logits_before, *kv_before], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("family", CONFIGS)
def test_lm_head_gives_the_boundary_tokens_logits(family: str) -> None:
    inputs = prompts(family)
    logits, kv = run_step(family, "PruneLMHead", "prefill", inputs)
    all_logits, kv_before = run_step(family, "InsertBoundaryRecompute", "prefill", inputs)
    boundary = torch.stack([all_logits[i, n - 1 : n] for i, n in enumerate(LENGTHS)])
    assert logits.shape == boundary.shape
    torch.testing.assert_close(logits, boundary, rtol=0, atol=1e-5)  # a matrix product of fewer rows sums otherwise
    assert all(torch.equal(a, b) for a, b in zip(kv, kv_before, strict=True))


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", ["PruneLMHead", "Cleanup"])
def test_prefill_is_the_reference(family: str, name: str) -> None:
    model = compiled(family)[0]
    inputs = prompts(family)
    ours = rows(inputs, run_step(family, name, "prefill", inputs))
    expected = pop(model, inputs, PRUNED[family])
    assert_close(ours, expected, 1e-5)
    skipped = rows(inputs, run_step(family, "InsertKVProjection", "prefill", inputs))
    for pruned, boundary_skips in zip(expected, skipped, strict=True):  # the boundary's way shows in the logits
        assert (pruned[0] - boundary_skips[0][-1:]).abs().max() > 0.1


def test_pruning_an_inner_layer_changes_what_follows() -> None:
    """So that agreement with the reference says something: the pruned model is another one."""
    model = compiled("gemma3")[0]
    inputs = prompts("gemma3")
    for ours, full in zip(pop(model, inputs, [1]), full_model(model, inputs), strict=True):
        assert (ours[0] - full[0][-1:]).abs().max() > 0.1
        assert (ours[-1] - full[-1]).abs().max() > 0.1


# Lowered graphs hold ONNX operators and run in ONNX Runtime alone.


def onnx_prompts(family: str) -> list[Inputs]:
    """ONNX Runtime's CPU kernel takes several tokens after a past for one row only."""
    model = compiled(family)[0]
    uneven = make_inputs(model, [1, 1], 5)  # pasts of 5 and 2 tokens, as in a batch that is being decoded
    uneven.mask[1, 3:] = 0
    return [make_inputs(model, LENGTHS), make_inputs(model, [9], PAST), make_inputs(model, [1, 1], PAST), uneven]


LOWERED = [
    "LowerAttention", "PackQKV", "LowerRotaryEmbedding", "LowerRMSNorm", "FuseSkipRMSNorm", "LowerLinear",
    "FoldParameters",
]  # fmt: skip


@pytest.mark.parametrize(
    ("family", "name"),
    [*(("llama", name) for name in LOWERED), *((family, "LastCleanup") for family in [*CONFIGS, *SMALL_HEADS])],
)
def test_lowered_prefill_is_the_reference(family: str, name: str, tmp_path: Path) -> None:
    model, steps = compiled(family)
    inputs = onnx_prompts(family)
    for given, result in zip(inputs, run_onnx(tmp_path, steps[name], "prefill", model, inputs), strict=True):
        # other kernels; logits are up to 10
        assert_close(rows(given, result), pop(model, given, PRUNED[family]), 1e-4)


@pytest.mark.parametrize("family", CONFIGS)
def test_lowered_decode_is_the_model(family: str, tmp_path: Path) -> None:
    model, steps = compiled(family)
    inputs = onnx_prompts(family)
    for given, result in zip(inputs, run_onnx(tmp_path, steps["LastCleanup"], "decode", model, inputs), strict=True):
        assert_close(rows(given, result), full_model(model, given), 1e-4)


@pytest.mark.parametrize("block", [1, 4, 100])
@pytest.mark.parametrize("family", [*CONFIGS, "gemma3, small heads"])
def test_attention_in_blocks_is_the_reference(
    family: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Blocks that divide the prompt and that do not, Gemma's window within and across them, padding, a past, and
    prompts that are cut into longer ones.
    """
    monkeypatch.setitem(PROVIDERS, "cpu", replace(PROVIDERS["cpu"], query_block=block))
    model, steps = compiled(family)
    padded = make_inputs(model, [9])
    padded.mask[:, 7:], padded.lengths = 0, [7]
    inputs = [*onnx_prompts(family), make_inputs(model, [16], 2), padded, make_inputs(model, [32])]
    for given, result in zip(inputs, run_onnx(tmp_path, steps["LastCleanup"], "prefill", model, inputs), strict=True):
        assert_close(rows(given, result), pop(model, given, PRUNED[family]), 1e-4)


@pytest.mark.parametrize(
    ("rows", "tokens", "sizes"),
    [(1, 100, (128, 128)), (1, 4095, (128, 128)), (1, 4096, (256, 128)), (1, 8000, (384, 128)), (2, 300, (300, 300))],
)
def test_blocks_grow_with_the_prompt(rows: int, tokens: int, sizes: tuple[int, int]) -> None:
    """Without a window, and with one; a batch is one block."""
    integers = onnx_ir.TensorType(onnx_ir.DataType.INT64)
    inputs = [
        onnx_ir.Value(name=n, type=integers, shape=onnx_ir.Shape(["b", n])) for n in ("input_ids", "attention_mask")
    ]
    graph = onnx_ir.Graph(inputs, [], nodes=[onnx_ir.node("Identity", inputs[:1])], opset_imports={"": 21}, name="g")
    cuts = Shared(graph, 128, {False, True}).cuts
    for window in (False, True):
        cuts[window].size.type = integers
        graph.outputs.append(cuts[window].size)
    model = onnx_ir.to_proto(onnx_ir.Model(graph, ir_version=10)).SerializeToString()
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    ids = np.zeros((rows, tokens), dtype=np.int64)
    assert tuple(int(size[0]) for size in session.run(None, {"input_ids": ids, "attention_mask": ids})) == sizes


def kinds(graph: Iterable[Node]) -> Counter[str]:
    return Counter(node.op_type for node in graph)


@pytest.mark.parametrize("family", [*CONFIGS, *SMALL_HEADS])
def test_what_the_operators_take_over(family: str) -> None:
    """RoPE where heads are wide enough, one product for q, k and v where no norm is between, residual additions."""
    program = compiled(family)[1]["LastCleanup"].program
    decode = to_onnx(program, ["decode"], "cuda")["decode"].graph
    found = kinds(decode)
    layers, norms = program.num_layers, "gemma3" in family
    assert found["RotaryEmbedding"] == (2 * layers if "small" in family else 0)
    packed = [n for n in decode if n.op_type == "GroupQueryAttention" and n.inputs[1] is None]
    assert len(packed) == (0 if norms or "small" in family else layers)
    # the first norm of the model follows the embedding; Gemma has four a layer and two more of q and k
    assert found["SkipSimplifiedLayerNormalization"] == 2 * layers
    assert found["SimplifiedLayerNormalization"] == 1 + (4 * layers if norms else 0)


@pytest.mark.parametrize(
    ("provider", "stage", "chosen"),
    [("cpu", "prefill", True), ("cpu", "decode", True), ("cuda", "prefill", True), ("cuda", "decode", False)],
)
def test_one_token_is_a_branch(provider: str, stage: str, chosen: bool) -> None:
    """One choice for the whole graph, where its attention is rewritten: in blocks, which are the provider's affair, or
    over projected keys and values. A single token then runs through the whole model and nothing else.
    """
    program = compiled("gemma3")[1]["LastCleanup"].program
    graph = to_onnx(program, [stage], provider)[stage].graph
    if not chosen:
        assert "If" not in kinds(graph) and kinds(graph)["GroupQueryAttention"] == 3
        return
    assert kinds(graph) == {"Shape": 1, "Equal": 1, "Squeeze": 1, "If": 1}
    one, several = (graph[-1].attributes[name].as_graph() for name in ("then_branch", "else_branch"))
    assert kinds(one)["GroupQueryAttention"] == kinds(several)["GroupQueryAttention"] + kinds(several)["If"] == 3
    assert not {"If", "Loop", "Slice", "GatherElements"} & set(kinds(one))
    # keys and values of the prompt in the one pruned layer of three
    assert kinds(several)["MatMul"] - kinds(one)["MatMul"] == (2 if stage == "prefill" else 0)
    assert kinds(several)["If"] == (0 if provider == "cuda" else 2 if stage == "prefill" else 3)
    assert not one.initializers and not several.initializers


@pytest.mark.parametrize("stage", ["prefill", "decode"])
@pytest.mark.parametrize("family", CONFIGS)
def test_cache_with_room(family: str, stage: str, tmp_path: Path) -> None:
    """A past in buffers with room behind its tokens, whatever is in it: the same logits and entries, and room left."""
    model, steps = compiled(family)
    exact = onnx_prompts(family)
    roomy = [replace(i, past=[torch.nn.functional.pad(t, (0, 0, 0, 12), value=1e9) for t in i.past]) for i in exact]
    results = run_onnx(tmp_path, steps["LastCleanup"], stage, model, [*exact, *roomy])
    for given, expected, found in zip(exact, results, results[len(exact) :], strict=False):
        assert found[1][0].shape[2] == given.past[0].shape[2] + 12
        assert_close(rows(given, found), rows(given, expected), 0)
