"""Drop layers from a stage altogether.

A baseline for evaluation, not a part of compiling: what pruning would cost without POP's stage split (ShortGPT,
arXiv 2403.03853, drops layers in prefill and decode alike). A dropped layer hands its input on, for every token:

    x1 = layer(x0); x2 = layer(x1)   =>   x2 = layer(x0)

Its K/V cache entries stay among the stage's outputs, so that the graph keeps its inputs and outputs; nothing reads
them.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from . import ops
from .base import Pass
from .graph import call_nodes, find, layer_of
from .layers import layer_input, layer_output


class DropLayers(Pass):
    stages = ("prefill", "decode")

    def __init__(self, layers: Iterable[int]) -> None:
        super().__init__()
        self.layers = sorted(set(layers))

    def requires(self, graph_module: fx.GraphModule) -> None:
        unknown = [layer for layer in self.layers if not 0 <= layer < self.program.num_layers]
        self.check(not unknown, f"the model has {self.program.num_layers} layers, asked to drop {unknown}")
        self.check(len(self.layers) < self.program.num_layers, "at least one layer must stay")
        self.check(len(find(graph_module, op=ops.attention)) == self.program.num_layers, "layers are missing already")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for layer in self.layers:  # ascending, so the input of each is already that of its run
            entry, end = layer_input(graph_module, layer), layer_output(graph_module, layer)
            for user in [u for u in end.users if layer_of(u) != layer]:
                user.replace_input_with(end, entry)
            self.matches += 1
        graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, bool(self.layers))

    def ensures(self, graph_module: fx.GraphModule) -> None:
        left = {layer_of(n) for n in find(graph_module, op=ops.attention)}
        kept = set(range(self.program.num_layers)) - set(self.layers)
        self.check(left == kept, f"layers {left} attend, not {kept}")
        caches = {layer_of(n) for n in call_nodes(graph_module) if n.target == ops.append_kv}
        self.check(caches == set(range(self.program.num_layers)), "a layer lost its K/V cache entry")
