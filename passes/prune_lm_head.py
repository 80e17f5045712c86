"""Keep only the boundary token's hidden state before the LM head.

Prefill needs one row of logits per sequence. Without this pass the LM head is the largest matrix product of a
prompt: S x hidden x vocabulary.

    norm -> lm_head -> logits [B, S, V]
    select_boundary -> norm -> lm_head -> logits [B, 1, V]
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from . import ops
from .base import Pass
from .graph import call_nodes, dependencies, emit, find, layer_of, outputs_of, set_value, shape_of, walk_back
from .layers import boundary_index_of
from .tail import boundary_of, find_insertions


class PruneLMHead(Pass):
    stages = ("prefill",)

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.check(len(find(graph_module, role="lm_head")) == 1, "the graph needs one lm_head")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        hidden = walk_back(find(graph_module, role="lm_head")[0], _hands_on_the_stream)
        if hidden is None:
            self.check(False, "lm_head reads no layer")
        assert hidden is not None
        head = [n for n in call_nodes(graph_module) if layer_of(n) is None and n.target != ops.boundary_index]
        if hidden in find_insertions(graph_module):
            boundary = boundary_of(graph_module, hidden)
        else:
            index = boundary_index_of(graph_module)
            with graph.inserting_after(hidden):
                boundary = emit(graph, ops.select_boundary, hidden, index)
            boundary.meta["role"] = "boundary"
        hidden.replace_all_uses_with(boundary, delete_user_cb=lambda user: user in head)
        logits = dependencies([outputs_of(graph_module)[0]], lambda n: n in head)
        for node in head:
            if node in logits and isinstance(node.meta["val"], torch.Tensor):
                set_value(node)
                self.matches += 1
        graph.eliminate_dead_code()
        return PassResult(graph_module, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        shape = shape_of(outputs_of(graph_module)[0])
        self.check(len(shape) == 3 and shape[1] == 1, f"logits are {shape}, not [batch, 1, vocabulary]")


def _hands_on_the_stream(node: fx.Node) -> bool:
    """Whether it is a layer's, or adds something to what a layer hands on: DeepStack's image features may follow the
    last layer that is left.
    """
    added = [n for n in node.all_input_nodes if n.op != "get_attr" and isinstance(n.meta["val"], torch.Tensor)]
    return layer_of(node) is not None or (node.target == torch.ops.aten.add.Tensor and len(added) == 2)
