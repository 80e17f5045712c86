"""Make the K/V cache entries of pruned layers from the hidden state that bypasses them.

Decode attends to the prompt in every layer, so a pruned layer still owes its keys and values. The KV projection
computes them from x_cut, the residual stream where the bypass begins. With the layer's own weights it is the layer's
input norm, k_proj, v_proj, k norm and RoPE, applied to x_cut (POP, arXiv 2602.03295, section 3.2). A calibrated
projection takes the place of input norm, k_proj and v_proj:

    k, v = linear(x_cut / rms(x_cut)), fitted to what the layer makes in the whole model

The first token of a sequence is an attention sink with activations of its own: its keys and values are constants.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from . import ops
from .base import Pass
from .contract import ContractError
from .graph import call_nodes, dependencies, emit, find, layer_of, replace, role_of, shape_of
from .layers import emit_affine, projected_kv

aten = torch.ops.aten


def projection_nodes(gm: fx.GraphModule, layer: int) -> list[fx.Node]:
    """The nodes of a layer that its cache entries are computed from, in graph order."""
    caches = find(gm, op=ops.append_kv, layer=layer)
    needed = dependencies(caches, lambda n: n.op == "call_function" and layer_of(n) == layer)
    return [n for n in gm.graph.nodes if n in needed and n not in caches]


class InsertKVProjection(Pass):
    """layers: those whose entries are projected. calibrated: those of them with weights `kv_projection.N.*`.

    weight [keys + values, hidden], bias and sink [keys + values], in the program's constants.
    """

    stages = ("prefill",)

    def __init__(self, layers: Iterable[int], calibrated: Iterable[int] = ()) -> None:
        super().__init__()
        self.layers = sorted(set(layers))
        self.calibrated = frozenset(calibrated)

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.check(self.calibrated <= set(self.layers), "calibrated projections are for pruned layers")
        for layer in self.layers:
            nodes = {n for n in call_nodes(graph_module) if layer_of(n) == layer and n.target != ops.append_kv}
            extra = nodes - set(projection_nodes(graph_module, layer)) - set(find(graph_module, op=ops.skip_layers))
            self.check(not extra, f"layer {layer} still computes {sorted(n.name for n in extra)}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for layer in self.layers:
            if layer in self.calibrated:
                self._insert_calibrated(graph_module, layer)
            for node in projection_nodes(graph_module, layer):
                role = (role_of(node) or "").removeprefix("kv_projection").lstrip("/")
                node.meta["role"] = "kv_projection" + (f"/{role}" if role else "")
            self.matches += 1
        graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, self.matches > 0)

    def _insert_calibrated(self, gm: fx.GraphModule, layer: int) -> None:
        key, value = projected_kv(gm, layer)
        keys, values = (int(shape_of(n)[2]) for n in (key, value))
        x = _entry(gm, layer)
        with gm.graph.inserting_before(min(key, value)):
            both = emit_affine(gm, x, f"kv_projection.{layer}", keys + values, like=key, role="calibrated")
            parts = [
                emit(gm.graph, aten.slice.Tensor, both, 2, start, start + size, like=old)
                for start, size, old in ((0, keys, key), (keys, values, value))
            ]
        for old, new in zip((key, value), parts, strict=True):
            replace(old, new)

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


def _entry(gm: fx.GraphModule, layer: int) -> fx.Node:
    """x_cut, the hidden state that is handed past the layer."""
    for skip in find(gm, op=ops.skip_layers):
        x, first, last = skip.args
        if first <= layer <= last:
            assert isinstance(x, fx.Node)
            return x
    raise ContractError(f"layer {layer} is not skipped")
