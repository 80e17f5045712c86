"""Lower linear layers to MatMul with the weight stored as [in, out].

MatMul is what ONNX Runtime's fusions and quantizers look for. The transpose is folded into the initializer, except
where the same parameter is also read as it is (embeddings tied to the LM head), in whichever graph of the program:
there com.microsoft FusedMatMul transposes on the fly, so the parameter is stored once.
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from .base import Pass
from .fold_parameters import foldable
from .graph import emit, emit_sizes, find, replace, shape_of, value_of
from .onnx_ops import CONTRIB, emit_onnx

aten = torch.ops.aten


class LowerLinear(Pass):
    stages = ("prefill", "decode")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        shared = set().union(*(_read_as_is(gm) for gm in self.program.graphs.values()))
        for node in find(graph_module, op=aten.linear.default):
            x, weight = node.args[:2]
            bias = node.args[2] if len(node.args) > 2 else None
            assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
            with graph.inserting_before(node):
                if weight.op == "get_attr" and weight.target in shared:
                    out = emit_onnx(
                        graph,
                        f"{CONTRIB}::FusedMatMul",
                        [x, weight],
                        {"transB": 1},
                        shape=[*emit_sizes(graph, x)[:-1], shape_of(weight)[0]],
                        dtype=value_of(node).dtype,
                        like=node,
                    )
                else:
                    transposed = emit(graph, aten.permute.default, weight, [1, 0], like=node)
                    out = emit(graph, aten.matmul.default, x, transposed, like=node)
                if isinstance(bias, fx.Node):
                    out = emit(graph, aten.add.Tensor, out, bias, like=node)
            replace(node, out)
            self.matches += 1
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        self.check(not find(graph_module, op=aten.linear.default), "a linear is left")


def _read_as_is(gm: fx.GraphModule) -> set[str]:
    """Parameters that something else than linear layers and expressions of parameters reads."""
    folded = foldable(gm)
    return {
        str(n.target)
        for n in gm.graph.nodes
        if n.op == "get_attr" and any(u.target != aten.linear.default and u not in folded for u in n.users)
    }
