"""Lower rotary position embedding to ONNX Runtime's RotaryEmbedding.

Spec: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftrotaryembedding
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from . import ops
from .base import Pass
from .graph import emit_sizes, find, replace, shape_of, value_of
from .onnx_ops import CONTRIB, emit_onnx

aten = torch.ops.aten


def emit_rotary(
    graph: fx.Graph, x: fx.Node, positions: Any, cos: Any, sin: Any, *, like: fx.Node, heads: int
) -> fx.Node:
    """RotaryEmbedding of x, [B, S, heads x D] or [B, heads, S, D]; tables [max positions, R / 2]."""
    rotary_size = 2 * shape_of(cos)[1]
    shape = shape_of(x)
    head_size = shape[-1] // heads if len(shape) == 3 else shape[-1]
    attributes: dict[str, int] = {}
    if len(shape) == 3 or rotary_size < head_size:
        attributes["num_heads"] = heads
    if rotary_size < head_size:
        attributes["rotary_embedding_dim"] = rotary_size
    return emit_onnx(
        graph,
        f"{CONTRIB}::RotaryEmbedding",
        [x, positions, cos, sin],
        attributes,
        shape=emit_sizes(graph, x),
        dtype=value_of(x).dtype,
        like=like,
    )


class LowerRotaryEmbedding(Pass):
    stages = ("prefill", "decode")

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.check(not find(graph_module, op=ops.attention), "attention is lowered first: it takes RoPE's layout along")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for node in find(graph_module, op=ops.rotary_embedding):
            x, positions, cos, sin = node.args
            assert isinstance(x, fx.Node)
            with graph_module.graph.inserting_before(node):
                lowered = emit_rotary(graph_module.graph, x, positions, cos, sin, like=node, heads=shape_of(x)[1])
            replace(node, lowered)
            self.matches += 1
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        self.check(not find(graph_module, op=ops.rotary_embedding), "a rotary_embedding is left")
