"""Tell every node which decoder layer it belongs to and what it does there.

The layer is read from the module path that torch.export keeps: attention nodes show which module list holds the
layers, and every node below item i of that list is in layer i. Roles follow from structure, starting at attention:

    input_norm -> q_proj, k_proj, v_proj (-> q_norm, k_norm) -> rope -> append_kv -> attention -> o_proj -> mlp

In a mixture of experts the projection that chooses them is the router, what else there is the mlp.
Outside the layers: embedding, final_norm, lm_head.
"""

from __future__ import annotations

import re

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from . import ops
from .base import Pass
from .graph import call_nodes, find, layer_of, outputs_of, role_of, walk_back

aten = torch.ops.aten
_PROJECTIONS = {aten.linear.default, aten.addmm.default, aten.mm.default}


def is_projection(node: fx.Node) -> bool:
    """A matrix product with a weight."""
    return node.op == "call_function" and node.target in _PROJECTIONS


class AnnotateLayers(Pass):
    def requires(self, graph_module: fx.GraphModule) -> None:
        self.check(bool(find(graph_module, op=ops.attention)), "the graph has no attention node")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        prefix = self._layer_list(graph_module)
        for node in call_nodes(graph_module):
            node.meta.pop("role", None)
            if (layer := _layer_from_path(node, prefix)) is not None:
                node.meta["layer"] = layer
                self.matches += 1
        self._mark_roles(graph_module)
        return PassResult(graph_module, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        layers = [layer_of(n) for n in find(graph_module, op=ops.attention)]
        self.check(layers == list(range(self.program.num_layers)), f"attention nodes are in layers {layers}")
        for role in ("q_proj", "k_proj", "v_proj", "o_proj"):
            found = {layer_of(n) for n in find(graph_module, role=role)}
            fused = {layer_of(n) for n in find(graph_module, role="qkv_proj")}
            self.check(found | fused >= set(layers), f"no {role} in layers {sorted(set(layers) - found - fused)}")
        self.check(len(find(graph_module, role="lm_head")) == 1, "the graph needs one lm_head")

    @staticmethod
    def _layer_list(gm: fx.GraphModule) -> str:
        """Path of the module list that holds the decoder layers, e.g. "model.layers"."""
        for path in _module_paths(find(gm, op=ops.attention)[0]):
            if match := re.fullmatch(r"(.*)\.\d+", path):
                return match[1]
        return ""

    def _mark_roles(self, gm: fx.GraphModule) -> None:
        for attention in find(gm, op=ops.attention):
            attention.meta["role"] = "attention"
            query, key, value = attention.args[:3]
            projections = [self._mark_operand(n, role) for n, role in ((query, "q"), (key, "k"), (value, "v"))]
            if len(set(projections)) < 3:  # one matrix product makes several of q, k and v
                for projection in projections:
                    projection.meta["role"] = "qkv_proj"
            norm = walk_back(projections[1].args[0], lambda n: _is_norm(n))
            if norm is not None and layer_of(norm) == layer_of(attention):
                norm.meta["role"] = "input_norm"
            self._mark_after(attention)
        for experts in find(gm, op=ops.experts):
            experts.meta["role"] = "mlp"
            router = walk_back(experts.args[3], is_projection)
            if router is not None and layer_of(router) == layer_of(experts):
                router.meta["role"] = "router"
        for node in find(gm, op=aten.embedding.default):
            node.meta.setdefault("role", "embedding")
        head = walk_back(outputs_of(gm)[0], is_projection)
        if head is not None:
            head.meta["role"] = "lm_head"
        for node in call_nodes(gm):
            if _is_norm(node) and layer_of(node) is None:
                node.meta["role"] = "final_norm"

    def _mark_operand(self, operand: object, role: str) -> fx.Node:
        """Mark everything between an attention operand and its projection; returns the projection."""
        node = operand
        while isinstance(node, fx.Node) and not is_projection(node):
            if node.target in (ops.append_kv, ops.write_kv):
                node.meta["role"] = f"{'key' if role == 'k' else 'value'}_cache"
                node = node.args[1]
                continue
            if node.target in ops.ROTATIONS:
                node.meta["role"] = "rope"
            elif _is_norm(node):
                node.meta["role"] = f"{role}_norm"
            node = next((n for n in node.all_input_nodes if n.op != "get_attr"), None)
        if not isinstance(node, fx.Node):
            self.check(False, f"attention's {role} does not come from a projection")
        assert isinstance(node, fx.Node)
        node.meta["role"] = f"{role}_proj"
        return node

    @staticmethod
    def _mark_after(attention: fx.Node) -> None:
        """o_proj is the first projection that reads attention; the layer's others are the feed-forward block's."""
        found_output = False
        layer = layer_of(attention)
        node = attention
        while (node := node.next).op != "output":
            if layer_of(node) != layer or not is_projection(node):
                continue
            if not found_output:
                node.meta["role"], found_output = "o_proj", True
            elif role_of(node) is None:
                node.meta["role"] = "mlp"


def _is_norm(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in (ops.rms_norm, aten.layer_norm.default)


def _module_paths(node: fx.Node) -> list[str]:
    """Module paths that a node was traced in, outermost first."""
    return [str(entry[0]) for entry in node.meta.get("nn_module_stack", {}).values()]


def _layer_from_path(node: fx.Node, prefix: str) -> int | None:
    for path in reversed(_module_paths(node)):
        if match := re.match(re.escape(prefix) + r"\.(\d+)(\.|$)", path):
            return int(match[1])
    return None
