"""Which tokens of a prompt take the whole model: the boundary tokens, or a window that ends with them.

    window 1    index = boundary_index(mask, ids);           select_boundary, insert_boundary      [B, 1, ...]
    window w    start = tail_start(mask, ids, w);            select_tail, insert_tail              [B, min(w, S), ...]

A tail of one token is what POP runs (arXiv 2602.03295, section 3.3).
"""

from __future__ import annotations

import torch
from torch import fx

from . import ops
from .graph import emit, find, mask_of, tokens_of
from .layers import boundary_index_of


class Tail:
    """The last min(window, S) tokens of each row, in a graph that has positions."""

    def __init__(self, gm: fx.GraphModule, window: int) -> None:
        self.graph, self.window = gm.graph, window
        self.first = boundary_index_of(gm) if window == 1 else _tail_start_of(gm, window)

    def select(self, x: fx.Node, like: fx.Node | None = None) -> fx.Node:
        """The tail's rows of x [B, S, ...], at the graph's insertion point."""
        if self.window == 1:
            return emit(self.graph, ops.select_boundary, x, self.first, like=like)
        return emit(self.graph, ops.select_tail, x, self.first, self.window, like=like)

    def insert(self, x: fx.Node, tail: fx.Node, like: fx.Node | None = None) -> fx.Node:
        """x [B, S, ...] with the tail's rows replaced, at the graph's insertion point."""
        target = ops.insert_boundary if self.window == 1 else ops.insert_tail
        return emit(self.graph, target, x, tail, self.first, like=like)


def find_insertions(gm: fx.GraphModule, layer: int | None = None) -> list[fx.Node]:
    """What puts the tail's rows back among all, after runs of pruned layers; layer: the last one of a run."""
    return [n for op in (ops.insert_boundary, ops.insert_tail) for n in find(gm, op=op, layer=layer)]


def boundary_of(gm: fx.GraphModule, merged: fx.Node) -> fx.Node:
    """The boundary token's row [B, 1, ...] of the tail that `merged` inserts."""
    _, tail, first = merged.args
    assert isinstance(tail, fx.Node) and isinstance(first, fx.Node)
    if merged.target == ops.insert_boundary:
        return tail
    last = boundary_index_of(gm)
    with gm.graph.inserting_before(merged.next):
        index = emit(gm.graph, torch.ops.aten.sub.Tensor, last, first)
        boundary = emit(gm.graph, ops.select_boundary, tail, index)
    boundary.meta["role"] = "boundary"
    return boundary


def _tail_start_of(gm: fx.GraphModule, window: int) -> fx.Node:
    """The graph's tail_start node, [B] int64; made on first use, after the positions."""
    if existing := find(gm, op=ops.tail_start):
        return existing[0]
    with gm.graph.inserting_after(find(gm, op=ops.token_positions)[0]):
        node = emit(gm.graph, ops.tail_start, mask_of(gm), tokens_of(gm), window)
    node.meta["role"] = "tail_start"
    return node
