"""Give every token a row of its own in RoPE's tables, where it has several positions.

No kernel turns the pairs of a head by different positions. The rows that a prompt reads are gathered once, for all
layers, and the rotation reads them as if tokens stood at the positions 0, 1, ... of tables made for them:

    rotary_embedding_axes(x, positions [B, S, A], cos, sin, axes)
        => rotary_embedding(x, token_rows(positions), gather(cos, 0, rows), gather(sin, 0, rows))
           rows = rotary_rows(positions, axes)  [B S, R/2]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from . import ops
from .base import Pass
from .graph import emit, find, replace

aten = torch.ops.aten


class GatherRotaryRows(Pass):
    stages = ("prefill", "decode")

    def requires(self, graph_module: fx.GraphModule) -> None:
        for node in find(graph_module, op=ops.rotary_embedding_axes):
            tables = node.args[2:4]
            self.check(all(isinstance(t, fx.Node) and t.op == "get_attr" for t in tables), f"{node.name} has no tables")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        gathered: dict[Any, list[fx.Node]] = {}  # two tables have rows for each set of positions: all, and the tail's
        for node in find(graph_module, op=ops.rotary_embedding_axes):
            x, positions, *tables, axes = node.args
            assert isinstance(positions, fx.Node) and isinstance(axes, list | tuple)
            key = (positions, *tables, tuple(axes))
            if key not in gathered:
                gathered[key] = _gather(graph_module.graph, positions, tables, axes)
            with graph_module.graph.inserting_before(node):
                rotated = emit(graph_module.graph, ops.rotary_embedding, x, *gathered[key], like=node)
            replace(node, rotated)
            self.matches += 1
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        self.check(not find(graph_module, op=ops.rotary_embedding_axes), "a rotary_embedding_axes is left")


def _gather(graph: fx.Graph, positions: fx.Node, tables: list[Any], axes: Any) -> list[fx.Node]:
    """Every token's row [B, S], and the rows [B S, R/2] of each table."""
    with graph.inserting_before(max(positions, *tables).next):
        rows = emit(graph, ops.rotary_rows, positions, list(axes))
        return [
            emit(graph, ops.token_rows, positions),
            *(emit(graph, aten.gather.default, table, 0, rows) for table in tables),
        ]
