"""Compute queries, keys and values with one matrix product.

    GroupQueryAttention(linear(x, W_q), linear(x, W_k), linear(x, W_v), ...)
        => GroupQueryAttention(linear(x, [W_q; W_k; W_v]), None, None, ...)

The operator takes the three side by side. One product of all columns is faster than three, two of which are narrow
where keys and values are shared by groups of heads. Norms between projection and attention keep them apart.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from . import ops
from .base import Pass
from .graph import call_nodes, emit, find, role_of
from .onnx_ops import onnx_inputs, onnx_op_type

aten = torch.ops.aten


#: roles of the projections that a packed one holds, side by side
PARTS = ("q_proj", "k_proj", "v_proj")


def part_features(role: str, features: int, kv_features: int) -> slice:
    """Which of the `features` outputs of a packed projection are those of one of PARTS.

    kv_features: outputs that keys have, and values.
    """
    ends = (0, features - 2 * kv_features, features - kv_features, features)
    place = PARTS.index(role)
    return slice(ends[place], ends[place + 1])


def packed_name(parameter: str) -> str:
    """What the packed parameter is called of which this one, "...q_proj.weight", is a part."""
    module, _, kind = parameter.rpartition(".")
    return f"{module.rpartition('.')[0]}.qkv_proj.{kind}".lstrip(".")


class PackQKV(Pass):
    stages = ("prefill", "decode")

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.check(not find(graph_module, op=ops.attention), "attention is lowered first")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for node in _packable(graph_module):
            projections, others = onnx_inputs(node)[:3], onnx_inputs(node)[3:]
            node.update_arg(1, [_packed(graph_module.graph, projections), None, None, *others])
            self.matches += 1
        graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        left = [n.name for n in _packable(graph_module)]
        self.check(not left, f"query, key and value of {left} are computed apart")


def _packable(gm: fx.GraphModule) -> list[fx.Node]:
    """Attention whose query, key and value are linear maps of one value and read by nothing else."""
    found = []
    for node in call_nodes(gm):
        if onnx_op_type(node) == "GroupQueryAttention":
            projections = [n for n in onnx_inputs(node)[:3] if n is not None]
            linear = [n for n in projections if n.target == aten.linear.default and len(n.users) == 1]
            if len(linear) == 3 and len({(n.args[0], len(n.args)) for n in linear}) == 1:
                found.append(node)
    return found


def _packed(graph: fx.Graph, projections: Sequence[Any]) -> fx.Node:
    query = projections[0]
    with graph.inserting_before(query):
        weights = [
            emit(graph, aten.cat.default, list(parts), 0, like=query)
            for parts in zip(*(n.args[1:] for n in projections), strict=True)
        ]
        packed = emit(graph, aten.linear.default, query.args[0], *weights, like=query)
    for weight, part in zip(weights, query.args[1:], strict=True):
        weight.meta["parameter"] = packed_name(str(part.target))
    packed.meta["role"] = (role_of(query) or "q_proj").replace("q_proj", "qkv_proj")
    return packed
