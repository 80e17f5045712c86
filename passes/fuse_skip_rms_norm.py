"""Fuse the addition to the residual stream into the norm that reads it.

    y = add(x, f); SimplifiedLayerNormalization(y)   =>   norm, _, _, y = SkipSimplifiedLayerNormalization(x, f)

The sum is normalised while it is at hand, and not written and read once more.
Spec: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftskipsimplifiedlayernormalization
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from . import ops
from .base import Pass
from .graph import call_nodes, emit, emit_sizes, find, replace, shape_of, value_of
from .onnx_ops import CONTRIB, attributes_of, emit_onnx_multi, onnx_inputs, onnx_op_type

aten = torch.ops.aten


class FuseSkipRMSNorm(Pass):
    stages = ("prefill", "decode")

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.check(not find(graph_module, op=ops.rms_norm), "norms are lowered first")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        while (norm := next(_norms_of_sums(graph_module), None)) is not None:
            _fuse(norm)
            self.matches += 1
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        left = [norm.name for norm in _norms_of_sums(graph_module)]
        self.check(not left, f"{len(left)} norms of a sum are left")


def _norms_of_sums(gm: fx.GraphModule) -> Iterator[fx.Node]:
    """Norms of the sum of two streams, whose weight is there before the sum is read."""
    return (n for n in call_nodes(gm) if onnx_op_type(n) == "SimplifiedLayerNormalization" and _reads_sum(n))


def _reads_sum(norm: fx.Node) -> bool:
    add, weight = onnx_inputs(norm)
    assert add is not None and weight is not None
    if add.target != aten.add.Tensor or add.kwargs or not all(_is_stream(n, add) for n in add.args):
        return False
    return weight < min(add.users)


def _fuse(norm: fx.Node) -> None:
    add, weight = onnx_inputs(norm)
    assert add is not None and weight is not None
    dtype = value_of(add).dtype
    with norm.graph.inserting_before(min(add.users)):  # what reads the sum must come after it
        shape = emit_sizes(norm.graph, add.args[0])
        fused = emit_onnx_multi(
            norm.graph,
            f"{CONTRIB}::SkipSimplifiedLayerNormalization",
            [*add.args, weight],
            {"epsilon": attributes_of(norm)["epsilon"]},
            shapes=[shape, [*shape[:-1], 1], [*shape[:-1], 1], shape],
            dtypes=[dtype, torch.float32, torch.float32, dtype],
            like=norm,
        )
        normed = emit(norm.graph, operator.getitem, fused, 0, like=norm)
        total = emit(norm.graph, operator.getitem, fused, 3, like=norm)
    replace(norm, normed)
    replace(add, total)


def _is_stream(value: object, add: fx.Node) -> bool:
    """Whether it is a tensor of the sum's shape [B, S, hidden], and no constant or broadcast bias."""
    return isinstance(value, fx.Node) and len(shape_of(value)) == 3 and shape_of(value) == shape_of(add)
