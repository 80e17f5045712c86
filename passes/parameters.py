"""Initializers that are computed from checkpoint tensors: a transposed weight, 1 + norm weight, a RoPE table.

A small graph states how, and it is run with the real tensors only when weights are written, one initializer at a
time. So passes may fold anything that depends on parameters alone without ever holding a weight.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from popcompile.upstream import LazyGraphModule, rename


@dataclass(frozen=True)
class Derived:
    """An initializer and how to compute it.

    sources: names of checkpoint tensors or of the program's constants, one per placeholder of `graph`.
    graph: returns the initializer.
    """

    sources: tuple[str, ...]
    graph: fx.GraphModule

    def compute(self, tensors: Sequence[torch.Tensor]) -> torch.Tensor:
        """The initializer's value for the sources' values, contiguous."""
        with torch.no_grad():
            return self.graph(*tensors).contiguous()

    def same_as(self, other: Derived) -> bool:
        """Whether the other is computed in the same way: nodes of equal expressions have equal names (`extract`)."""
        return self.sources == other.sources and _written(self.graph) == _written(other.graph)


def _written(gm: fx.GraphModule) -> list[tuple[object, ...]]:
    """The graph's calls in order, arguments as they are printed."""
    return [(n.op, n.target, repr(n.args), repr(n.kwargs)) for n in gm.graph.nodes]


def extract(
    roots: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    body: Sequence[fx.Node],
    fixed: Mapping[fx.Node, int] | None = None,
) -> fx.GraphModule:
    """The nodes of `body` as a graph of their own: placeholders for `inputs`, returns the one root (or a tuple).

    fixed: sizes that the body reads, as numbers.
    """
    numbers = fixed or {}
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {n: graph.placeholder(f"input_{i}") for i, n in enumerate(inputs)}
    for i, node in enumerate(body):
        mapping[node] = graph.node_copy(node, lambda n: numbers[n] if n in numbers else mapping[n])
        rename(mapping[node], f"step_{i}")  # equal expressions read the same, wherever they come from
    values = [mapping[r] for r in roots]
    graph.output(values[0] if len(values) == 1 else tuple(values))
    return LazyGraphModule(torch.nn.Module(), graph)
