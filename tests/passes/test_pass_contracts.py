"""Every pass refuses a graph that breaks its contract, before and after, and says how."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from steps import before, llama_steps
from torch import fx

from popcompile.passes import ContractError, Pass, Program, lowering, ops, transformations
from popcompile.passes.annotate_layers import AnnotateLayers
from popcompile.passes.balance_activations import BalanceActivations
from popcompile.passes.cleanup import Cleanup
from popcompile.passes.fold_parameters import FoldParameters
from popcompile.passes.fuse_rms_norm import FuseRMSNorm
from popcompile.passes.fuse_rotary_embedding import FuseRotaryEmbedding
from popcompile.passes.fuse_skip_rms_norm import FuseSkipRMSNorm
from popcompile.passes.gather_rotary_rows import GatherRotaryRows
from popcompile.passes.graph import emit, find, inputs_of, outputs_of, replace
from popcompile.passes.insert_boundary_recompute import InsertBoundaryRecompute
from popcompile.passes.insert_bypass import InsertBypass
from popcompile.passes.insert_kv_projection import InsertKVProjection
from popcompile.passes.lower_attention import LowerAttention
from popcompile.passes.lower_experts import ExpertKernels, LowerExperts
from popcompile.passes.lower_linear import LowerLinear
from popcompile.passes.lower_rms_norm import LowerRMSNorm
from popcompile.passes.lower_rotary_embedding import LowerRotaryEmbedding
from popcompile.passes.normalize import Normalize
from popcompile.passes.pack_qkv import PackQKV
from popcompile.passes.pad_heads import AttentionKernels, PadHeads
from popcompile.passes.prune_lm_head import PruneLMHead
from popcompile.passes.prune_prefill import PrunePrefill
from popcompile.passes.quantize_dynamic import QuantizeDynamic
from popcompile.passes.quantize_embedding import QuantizeEmbedding
from popcompile.passes.quantize_linear import Quantization, QuantizeLinear
from popcompile.passes.split_stages import SplitStages
from popcompile.passes.widen_logits import WidenLogits


@dataclass
class Breach:
    """A graph that breaks a pass's contract: the program before `at` (after it, for ensures), damaged."""

    compiler_pass: Callable[[], Pass]
    damage: Callable[[Program, fx.GraphModule], object]
    message: str
    ensures: bool = False
    at: str = ""
    stage: str = ""


def nothing(program: Program, gm: fx.GraphModule) -> None:
    """The graph is wrong for the pass as it is."""


def drop(op: object, by_argument: int) -> Callable[[Program, fx.GraphModule], None]:
    """Erase the first node of an operator."""

    def damage(program: Program, gm: fx.GraphModule) -> None:
        node = find(gm, op=op)[0]
        replace(node, node.args[by_argument])

    return damage


def use_before_definition(program: Program, gm: fx.GraphModule) -> None:
    first = next(n for n in gm.graph.nodes if n.op == "call_function")
    outputs_of(gm)[0].append(first)


def call_a_method(program: Program, gm: fx.GraphModule) -> None:
    logits = outputs_of(gm)[0]
    with gm.graph.inserting_after(logits):
        called = gm.graph.call_method("relu", (logits,))
    logits.replace_all_uses_with(called, delete_user_cb=lambda user: user is not called)


def add_to_a_view(program: Program, gm: fx.GraphModule) -> None:
    view = find(gm, op=torch.ops.aten.view.default)[0]
    with gm.graph.inserting_after(view):
        emit(gm.graph, torch.ops.aten.add_.Tensor, view, 1)


def copy_into_a_view(program: Program, gm: fx.GraphModule) -> None:
    """Into a part of what is a view itself."""
    view = find(gm, op=torch.ops.aten.view.default)[0]
    with gm.graph.inserting_before(view.next):
        source, part = (emit(gm.graph, torch.ops.aten.slice.Tensor, view, 1, i, i + 1) for i in (0, 1))
        emit(gm.graph, torch.ops.aten.copy_.default, part, source)


def rotate_by_computed_tables(program: Program, gm: fx.GraphModule) -> None:
    node = find(gm, op=ops.rotary_embedding)[0]
    x, positions, cos, sin = node.args
    with gm.graph.inserting_before(node):
        several = emit(gm.graph, torch.ops.aten.unsqueeze.default, positions, 2)
        tables = [emit(gm.graph, torch.ops.aten.neg.default, table) for table in (cos, sin)]
        emit(gm.graph, ops.rotary_embedding_axes, x, several, *tables, [0] * 8)


def forget_module_paths(program: Program, gm: fx.GraphModule) -> None:
    for node in find(gm, op=ops.attention)[1:]:
        del node.meta["nn_module_stack"]


def query_from_nowhere(program: Program, gm: fx.GraphModule) -> None:
    find(gm, op=ops.attention)[0].update_arg(0, inputs_of(gm)["past_key_values_0_key"])


def attend_to_an_input(program: Program, gm: fx.GraphModule) -> None:
    find(gm, op=ops.attention)[0].update_arg(1, inputs_of(gm)["past_key_values_0_key"])


def cap_scores_of_images(program: Program, gm: fx.GraphModule) -> None:
    node = find(gm, op=ops.attention)[0]
    node.update_kwarg("ends", node.args[3])
    node.update_arg(6, 50.0)


def two_heads(program: Program, gm: fx.GraphModule) -> None:
    find(gm, role="o_proj")[0].meta["role"] = "lm_head"


def two_positions(program: Program, gm: fx.GraphModule) -> None:
    positions = find(gm, op=ops.token_positions)[0]
    with gm.graph.inserting_after(positions):
        gm.graph.node_copy(positions)


def no_decode(program: Program, gm: fx.GraphModule) -> None:
    del program.graphs["decode"]


def return_the_past(program: Program, gm: fx.GraphModule) -> None:
    """The last layer's projected keys and values are computed for nobody."""
    for kind in ("key", "value"):
        append = find(gm, op=ops.append_kv, layer=1)[0]
        replace(append, inputs_of(gm)[f"past_key_values_1_{kind}"])


def project_from_a_deeper_layer(program: Program, gm: fx.GraphModule) -> None:
    find(gm, role="kv_projection/input_norm")[0].args[0].meta["layer"] = 2


def tell_apart(program: Program, gm: fx.GraphModule) -> None:
    outputs_of(program.graphs["decode"])[0]._rename("another")


def add_experts(program: Program, gm: fx.GraphModule) -> None:
    node = outputs_of(gm)[0]
    with gm.graph.inserting_after(node):
        gm.graph.call_function(ops.experts, (node,) * 5)


def round_logits(program: Program, gm: fx.GraphModule) -> None:
    logits = outputs_of(gm)[0]
    with gm.graph.inserting_after(logits):
        rounded = emit(gm.graph, torch.ops.aten.to.dtype, logits, torch.bfloat16)
    logits.replace_all_uses_with(rounded, delete_user_cb=lambda user: user is not rounded)


def lower_experts() -> LowerExperts:
    return LowerExperts(ExpertKernels())


def tie_the_head(program: Program, gm: fx.GraphModule) -> None:
    find(gm, role="lm_head")[0].update_arg(1, find(gm, op=torch.ops.aten.embedding.default)[0].args[0])


def quantize() -> QuantizeLinear:
    return QuantizeLinear(Quantization(bits=4))


def quantize_embedding() -> QuantizeEmbedding:
    return QuantizeEmbedding(Quantization(bits=4))


BREACHES = {
    "Normalize": Breach(Normalize, call_a_method, "the graph must be one flat torch.export graph"),
    "Normalize, after": Breach(
        Normalize, nothing, "an identity or an in-place operator is left", ensures=True, at="Traced"
    ),
    "Normalize, a view": Breach(Normalize, add_to_a_view, r"add_ changes what view shows"),
    "Normalize, a part": Breach(Normalize, copy_into_a_view, r"copy_ changes what view shows"),
    "FuseRMSNorm": Breach(FuseRMSNorm, use_before_definition, "was used before it has been defined"),
    "FuseRMSNorm, after": Breach(FuseRMSNorm, nothing, "are left in steps", ensures=True, at="Normalize"),
    "FuseRotaryEmbedding": Breach(FuseRotaryEmbedding, two_positions, "the graph needs one token_positions node"),
    "FuseRotaryEmbedding, after": Breach(
        FuseRotaryEmbedding, nothing, "are left in steps", ensures=True, at="Normalize"
    ),
    "AnnotateLayers": Breach(
        AnnotateLayers,
        lambda p, gm: (drop(ops.attention, 0)(p, gm), drop(ops.attention, 0)(p, gm)),
        "the graph has no attention node",
    ),
    "AnnotateLayers, layers": Breach(AnnotateLayers, forget_module_paths, r"attention nodes are in layers \[0, None\]"),
    "AnnotateLayers, query": Breach(AnnotateLayers, query_from_nowhere, "q does not come from a projection"),
    "AnnotateLayers, after": Breach(AnnotateLayers, two_heads, r"no o_proj in layers \[0\]", ensures=True),
    "SplitStages": Breach(SplitStages, nothing, "the program is split already", at="PrunePrefill"),
    "SplitStages, after": Breach(SplitStages, tell_apart, "the stages differ already", ensures=True),
    "PrunePrefill": Breach(lambda: PrunePrefill([1, 7]), nothing, r"has 2 layers, asked to prune \[7\]"),
    "PrunePrefill, twice": Breach(
        lambda: PrunePrefill([1]), nothing, "layers are missing already", at="InsertKVProjection"
    ),
    "PrunePrefill, after": Breach(lambda: PrunePrefill([0]), nothing, "a pruned layer still attends", ensures=True),
    "PrunePrefill, cache": Breach(
        lambda: PrunePrefill([1]), return_the_past, "a layer lost its K/V cache entry", ensures=True
    ),
    "InsertKVProjection": Breach(
        lambda: InsertKVProjection([1]), nothing, r"layer 1 still computes \[.*'attention_1'.*\]", at="PrunePrefill"
    ),
    "InsertKVProjection, after": Breach(
        lambda: InsertKVProjection([1]), project_from_a_deeper_layer, r"layer 1's K/V depend on \['add", ensures=True
    ),
    "InsertBoundaryRecompute": Breach(InsertBoundaryRecompute, no_decode, "there is no decode graph to copy"),
    "InsertBoundaryRecompute, twice": Breach(
        InsertBoundaryRecompute, nothing, "boundary recompute is inserted already", at="PruneLMHead"
    ),
    "InsertBoundaryRecompute, after": Breach(
        InsertBoundaryRecompute, nothing, "still skipped by every token", ensures=True, at="InsertKVProjection"
    ),
    "InsertBypass": Breach(lambda: InsertBypass([1], [0]), nothing, r"no run of pruned layers begins at \[0\]"),
    "InsertBypass, alone": Breach(lambda: InsertBypass([1], [1]), no_decode, "there is no decode graph"),
    "InsertBypass, too early": Breach(
        lambda: InsertBypass([1], [1]), nothing, "run InsertBoundaryRecompute first", at="InsertKVProjection"
    ),
    "InsertBypass, after": Breach(lambda: InsertBypass([1], [1]), nothing, "a run lacks its bypass", ensures=True),
    "PruneLMHead": Breach(PruneLMHead, two_heads, "the graph needs one lm_head"),
    "PruneLMHead, after": Breach(
        PruneLMHead, nothing, r"logits are .*, not \[batch, 1, vocabulary\]", ensures=True, at="InsertBoundaryRecompute"
    ),
    "Cleanup": Breach(Cleanup, use_before_definition, "was used before it has been defined"),
    "PadHeads": Breach(
        lambda: PadHeads(AttentionKernels(max_head_size=8)), nothing, "heads of 16 features, the kernels take at most 8"
    ),
    "PadHeads, after": Breach(
        lambda: PadHeads(AttentionKernels(head_multiple=12)), nothing, r"heads of \[16\] features are", ensures=True
    ),
    "GatherRotaryRows": Breach(GatherRotaryRows, rotate_by_computed_tables, "rotary_embedding_axes has no tables"),
    "GatherRotaryRows, after": Breach(
        GatherRotaryRows, rotate_by_computed_tables, "a rotary_embedding_axes is left", ensures=True
    ),
    "LowerAttention": Breach(LowerAttention, attend_to_an_input, "attention reads no cache of its own"),
    "LowerAttention, images": Breach(
        LowerAttention, cap_scores_of_images, "attention of images has sinks, or caps its scores"
    ),
    "LowerAttention, after": Breach(LowerAttention, nothing, r"\['attention', .* left", ensures=True, at="Cleanup"),
    "PackQKV": Breach(PackQKV, nothing, "attention is lowered first", at="LowerAttention"),
    "PackQKV, after": Breach(PackQKV, nothing, "are computed apart", ensures=True, at="LowerAttention"),
    "LowerRotaryEmbedding": Breach(
        LowerRotaryEmbedding, nothing, "attention is lowered first: it takes RoPE's layout along", at="LowerAttention"
    ),
    "LowerRotaryEmbedding, after": Breach(
        LowerRotaryEmbedding, nothing, "a rotary_embedding is left", ensures=True, at="Cleanup"
    ),
    "LowerRMSNorm": Breach(LowerRMSNorm, use_before_definition, "was used before it has been defined"),
    "LowerRMSNorm, after": Breach(LowerRMSNorm, nothing, "an rms_norm is left", ensures=True, at="Cleanup"),
    "FuseSkipRMSNorm": Breach(FuseSkipRMSNorm, nothing, "norms are lowered first", at="LowerRMSNorm"),
    "FuseSkipRMSNorm, after": Breach(
        FuseSkipRMSNorm, nothing, "4 norms of a sum are left", ensures=True, at="LowerRMSNorm"
    ),
    "LowerLinear": Breach(LowerLinear, use_before_definition, "was used before it has been defined"),
    "LowerLinear, after": Breach(LowerLinear, nothing, "a linear is left", ensures=True, at="Cleanup"),
    "LowerExperts": Breach(lower_experts, use_before_definition, "was used before it has been defined"),
    "LowerExperts, after": Breach(lower_experts, add_experts, "experts are left", ensures=True),
    "WidenLogits": Breach(WidenLogits, use_before_definition, "was used before it has been defined"),
    "WidenLogits, after": Breach(WidenLogits, round_logits, "the logits are in bf16", ensures=True),
    "BalanceActivations": Breach(BalanceActivations, nothing, "norms are lowered afterwards", at="FuseSkipRMSNorm"),
    "QuantizeDynamic": Breach(
        QuantizeDynamic, use_before_definition, "was used before it has been defined", at="LowerLinear"
    ),
    "QuantizeDynamic, after": Breach(QuantizeDynamic, nothing, "a linear of a layer", ensures=True, at="Cleanup"),
    "QuantizeEmbedding": Breach(
        quantize_embedding, use_before_definition, "was used before it has been defined", at="LowerLinear"
    ),
    "QuantizeEmbedding, after": Breach(
        quantize_embedding, tie_the_head, "an embedding of a weight that is quantized", ensures=True, at="Cleanup"
    ),
    "QuantizeLinear": Breach(quantize, use_before_definition, "was used before it has been defined", at="LowerLinear"),
    "QuantizeLinear, after": Breach(quantize, nothing, "a linear is left", ensures=True, at="Cleanup"),
    "FoldParameters": Breach(FoldParameters, use_before_definition, "was used before it has been defined"),
    "FoldParameters, after": Breach(
        FoldParameters, nothing, "an expression of parameters alone is left", ensures=True, at="LowerLinear"
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BREACHES)
def test_contract(case: str) -> None:
    breach = BREACHES[case]
    name = case.split(",")[0]
    at = breach.at or name
    program = (llama_steps()[at] if breach.ensures else before(llama_steps(), at)).program.clone()
    compiler_pass = breach.compiler_pass()
    compiler_pass.program = program
    gm = next(iter(program.graphs.values()))  # model, later prefill
    breach.damage(program, gm)
    with pytest.raises(ContractError, match=rf"^{name}: .*{breach.message}"):
        (compiler_pass.ensures if breach.ensures else compiler_pass)(gm)


def test_every_pass_has_a_contract() -> None:
    assert {case.split(",")[0] for case in BREACHES} == {
        p.name for p in [*transformations([]), *lowering(Quantization(bits=8, dynamic=True))]
    }
