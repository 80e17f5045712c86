"""Make the K/V cache entries of pruned layers from the hidden state that bypasses them.

Decode attends to the prompt in every layer, so a pruned layer still owes its keys and values. The KV projection
computes them from x_cut, the residual stream where the bypass begins. With the layer's own weights it is the layer's
input norm, k_proj, v_proj, k norm and RoPE, applied to x_cut (POP, arXiv 2602.03295, section 3.2).
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from . import ops
from .base import Pass
from .graph import call_nodes, dependencies, find, layer_of, role_of


def projection_nodes(gm: fx.GraphModule, layer: int) -> list[fx.Node]:
    """The nodes of a layer that its cache entries are computed from, in graph order."""
    caches = find(gm, op=ops.append_kv, layer=layer)
    needed = dependencies(caches, lambda n: n.op == "call_function" and layer_of(n) == layer)
    return [n for n in gm.graph.nodes if n in needed and n not in caches]


class InsertKVProjection(Pass):
    stages = ("prefill",)

    def __init__(self, layers: Iterable[int]) -> None:
        super().__init__()
        self.layers = sorted(set(layers))

    def requires(self, graph_module: fx.GraphModule) -> None:
        for layer in self.layers:
            nodes = {n for n in call_nodes(graph_module) if layer_of(n) == layer and n.target != ops.append_kv}
            extra = nodes - set(projection_nodes(graph_module, layer)) - set(find(graph_module, op=ops.skip_layers))
            self.check(not extra, f"layer {layer} still computes {sorted(n.name for n in extra)}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for layer in self.layers:
            for node in projection_nodes(graph_module, layer):
                role = role_of(node)
                node.meta["role"] = "kv_projection" + (f"/{role}" if role else "")
            self.matches += 1
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        for layer in self.layers:
            sources = {
                n
                for node in projection_nodes(graph_module, layer)
                for n in node.all_input_nodes
                if n.op == "call_function" and layer_of(n) is not None and layer_of(n) != layer
            }
            deeper = [n.name for n in sources if (layer_of(n) or 0) > layer]
            self.check(not deeper, f"layer {layer}'s K/V depend on {deeper}")
            self.check(len(find(graph_module, op=ops.append_kv, layer=layer)) == 2, f"layer {layer} needs K and V")
