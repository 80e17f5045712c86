"""Turn expressions of parameters into initializers.

A transposed weight or Gemma's 1 + norm weight is computed once, when weights are written, and not on every run. The
initializer keeps the (first) parameter's name unless the parameter is also read as it is; a pass that makes one
parameter of several names it, in the node's meta["parameter"].
"""

from __future__ import annotations

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from .base import Pass
from .graph import call_nodes, dependencies, register_parameter, replace, value_of
from .parameters import Derived, extract


class FoldParameters(Pass):
    stages = ("prefill", "decode")

    def __init__(self) -> None:
        super().__init__()
        self._read_as_is: set[str] = set()

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        folded = foldable(graph_module)
        self._read_as_is = set().union(*(self._parameters_read_as_is(gm) for gm in self.program.graphs.values()))
        for node in [n for n in call_nodes(graph_module) if n in folded]:
            if all(user in folded for user in node.users):
                continue
            self._fold(graph_module, node)
            self.matches += 1
        graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        self.check(not foldable(graph_module), "an expression of parameters alone is left")

    def _fold(self, gm: fx.GraphModule, node: fx.Node) -> None:
        needed = dependencies([node], lambda n: True)
        ordered = [n for n in gm.graph.nodes if n in needed]
        body = [n for n in ordered if n.op == "call_function"]
        # in the order of their use, so that equal expressions of two graphs are told to be equal
        parameters = list(dict.fromkeys(n for step in body for n in step.all_input_nodes if n.op == "get_attr"))
        derived = Derived(tuple(str(n.target) for n in parameters), extract([node], parameters, body))
        stem = next((n.meta["parameter"] for n in reversed(body) if "parameter" in n.meta), str(parameters[0].target))
        name = self._name(derived, stem)
        self.program.derived[name] = derived
        register_parameter(gm, name, value_of(node))
        with gm.graph.inserting_before(node):
            attribute = gm.graph.get_attr(name)
        attribute.meta["val"] = value_of(node)
        replace(node, attribute)

    def _parameters_read_as_is(self, gm: fx.GraphModule) -> set[str]:
        folded = foldable(gm)
        return {
            str(n.target)
            for n in gm.graph.nodes
            if n.op == "get_attr" and n.target not in self.program.derived and any(u not in folded for u in n.users)
        }

    def _name(self, derived: Derived, stem: str) -> str:
        """This name where nothing else has it, else one with a suffix."""
        number = 0
        while True:
            name = f"{stem}_{number}" if number else stem
            existing = self.program.derived.get(name)
            if name not in self._read_as_is and (existing is None or existing.same_as(derived)):
                return name
            number += 1


def foldable(gm: fx.GraphModule) -> set[fx.Node]:
    """Calls that depend on parameters alone."""
    found: set[fx.Node] = set()
    for node in call_nodes(gm):
        inputs = node.all_input_nodes
        if inputs and all(n.op == "get_attr" or n in found for n in inputs):
            found.add(node)
    return found
