"""Lower RMSNorm to ONNX Runtime's SimplifiedLayerNormalization, which every provider has a kernel for."""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from . import ops
from .base import Pass
from .graph import emit, emit_sizes, find, replace, value_of
from .onnx_ops import emit_onnx


class LowerRMSNorm(Pass):
    stages = ("prefill", "decode")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        for node in find(graph_module, op=ops.rms_norm):
            x, weight, eps = node.args
            assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
            dtype = value_of(x).dtype
            with graph.inserting_before(node):
                if value_of(weight).dtype != dtype:  # the operator returns the weight's dtype
                    weight = emit(graph, torch.ops.aten.to.dtype, weight, dtype, like=node)
                lowered = emit_onnx(
                    graph,
                    "SimplifiedLayerNormalization",
                    [x, weight],
                    {"axis": -1, "epsilon": eps, "stash_type": 1},
                    shape=emit_sizes(graph, x),
                    dtype=dtype,
                    like=node,
                )
            replace(node, lowered)
            self.matches += 1
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        self.check(not find(graph_module, op=ops.rms_norm), "an rms_norm is left")
