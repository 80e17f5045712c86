"""Put a virtual gate on every layer, one for each stage, to measure how much prefill and decode need it.

For analysis only, on the canonical graph. A gate scales what a layer adds to the residual stream, x_{l+1} = x_l +
g · F_l(x_l), context tokens taking the prefill gate and the boundary token the decode gate:

    x1 = layer(x0)   =>   x1 = virtual_gate(x0, layer(x0), gates, [layer], boundary_index)

With per="block" attention and the MLP have gates of their own, on the residual adds that they end in. All gates at 1
are the model; a layer whose prefill gate is 0 is bypassed by the context tokens, as PrunePrefill has it.
POP, arXiv 2602.03295, section 3.1.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from . import ops
from .base import Pass
from .graph import dependencies, emit, fake_mode_of, find, inputs_of, layer_of, role_of, shape_of
from .layers import boundary_index_of, layer_input, layer_output

#: what has gates of its own: a layer, or each of its residual blocks
Per = Literal["layer", "block"]

#: the input that gates are read from, f32 [layers, 2] or [layers, blocks, 2], the last dimension being prefill, decode
GATES = "gates"


class InsertVirtualGates(Pass):
    def __init__(self, per: Per = "layer") -> None:
        super().__init__()
        self.per = per
        #: with per="block", what the blocks of a layer are called, in order: "attention" and "mlp"
        self.blocks: tuple[str, ...] = ()

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.check(not {"prefill", "decode"} & set(self.program.graphs), "the program is split already")
        self.check(GATES not in inputs_of(graph_module), "the graph has gates already")
        layers = [layer_of(n) for n in find(graph_module, op=ops.attention)]
        self.check(layers == list(range(self.program.num_layers)), f"attention nodes are in layers {layers}")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        layers = range(self.program.num_layers)
        steps = [self._steps(graph_module, layer) for layer in layers]
        gates = self._add_input(graph_module)
        index = boundary_index_of(graph_module)
        for layer in layers:
            before = layer_input(graph_module, layer)
            for i, after in enumerate(steps[layer]):
                entry = [layer, i] if self.per == "block" else [layer]
                readers = list(after.users)
                with graph_module.graph.inserting_after(after):
                    gate = emit(graph_module.graph, ops.virtual_gate, before, after, gates, entry, index, like=after)
                gate.meta["role"] = "virtual_gate"
                for reader in readers:
                    reader.replace_input_with(after, gate)
                before = gate
                self.matches += 1
        return PassResult(graph_module, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        found = [tuple(n.args[3]) for n in find(graph_module, op=ops.virtual_gate)]
        expected = [(i, j) if self.blocks else (i,) for i in range(self.program.num_layers) for j in self._each()]
        self.check(found == expected, f"gates are {found}, not {expected}")
        shape = shape_of(inputs_of(graph_module)[GATES])
        self.check(shape == self._shape(), f"{GATES} is {shape}, not {self._shape()}")

    def _each(self) -> range:
        return range(len(self.blocks) or 1)

    def _shape(self) -> tuple[int, ...]:
        return (self.program.num_layers, *([len(self.blocks)] if self.blocks else []), 2)

    def _steps(self, gm: fx.GraphModule, layer: int) -> list[fx.Node]:
        """Values of the residual stream in a layer that are gated, in order; the last one is its output."""
        if self.per == "layer":
            return [layer_output(gm, layer)]
        stream = self._residual_stream(gm, layer)
        blocks = tuple(self._block(before, after) for before, after in pairwise(stream))
        self.check(
            sorted(blocks) == ["attention", "mlp"] and blocks == (self.blocks or blocks),
            f"layer {layer} adds {', '.join(blocks)} to the residual stream, not attention and MLP one after the other"
            " as every layer; its gates can only be per layer",
        )
        self.blocks = blocks
        return stream[1:]

    def _residual_stream(self, gm: fx.GraphModule, layer: int) -> list[fx.Node]:
        """The layer's input and every residual add up to its output."""
        stream, end = [layer_input(gm, layer)], layer_output(gm, layer)
        while stream[-1] is not end:
            adds = [n for n in stream[-1].users if layer_of(n) == layer and _is_add(n)]
            self.check(
                len(adds) == 1,
                f"layer {layer} is no chain of residual adds: {len(adds)} follow {stream[-1].name}; its gates can only"
                " be per layer",
            )
            stream += adds
        return stream

    @staticmethod
    def _block(before: fx.Node, after: fx.Node) -> str:
        """What a residual add adds."""
        added = dependencies(
            [n for n in after.all_input_nodes if n is not before],
            lambda n: n is not before and n.op == "call_function" and layer_of(n) == layer_of(after),
        )
        return (
            " + ".join(role for role in ("attention", "mlp") if any(role_of(n) == role for n in added))
            or "nothing known"
        )

    def _add_input(self, gm: fx.GraphModule) -> fx.Node:
        with gm.graph.inserting_after(list(inputs_of(gm).values())[-1]):
            gates = gm.graph.placeholder(GATES)
        with fake_mode_of(gm.graph):
            gates.meta["val"] = torch.empty(self._shape(), dtype=torch.float32)
        return gates


def _is_add(node: fx.Node) -> bool:
    """A plain sum of two different values."""
    return node.target == torch.ops.aten.add.Tensor and not node.kwargs and len(node.all_input_nodes) == 2
