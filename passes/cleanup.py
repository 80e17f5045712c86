"""Remove dead code, parameters that nobody reads, and expressions that are computed twice."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from .base import Pass
from .graph import call_nodes, replace


class Cleanup(Pass):
    stages = ("model", "prefill", "decode")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        before = len(call_nodes(graph_module))
        graph_module.graph.eliminate_dead_code()
        _merge_equal_calls(graph_module)
        self.matches += before - len(call_nodes(graph_module))
        return PassResult(graph_module, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        self.check_form(graph_module)


def _merge_equal_calls(gm: fx.GraphModule) -> None:
    """Let users of a call use the first one that computes the same. torch's CSEPass makes a new graph for it."""
    first: dict[Hashable, fx.Node] = {}
    for node in call_nodes(gm):
        call = node.target, _hashable(node.args), _hashable(node.kwargs)
        if (same := first.setdefault(call, node)) is not node:
            replace(node, same)


def _hashable(argument: Any) -> Hashable:
    """Equal for equal arguments of one type: 1, 1.0 and True are three."""
    if isinstance(argument, list | tuple):
        return tuple(map(_hashable, argument))
    if isinstance(argument, Mapping):
        return tuple((key, _hashable(value)) for key, value in argument.items())
    if isinstance(argument, slice):
        return slice, _hashable((argument.start, argument.stop, argument.step))
    return type(argument), argument
