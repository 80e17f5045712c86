"""Let the prompt bypass the pruned layers.

Prefill needs the deep layers for the boundary token only. For a run of pruned layers, the residual stream is handed
past them; what remains of each layer is what its K/V cache entry needs.

    x1 = layer(x0); x2 = layer(x1)   =>   x2 = skip_layers(x0), and K/V of both layers from x0

What is added to the stream between two layers ends a run, and is added still: DeepStack's image features.

After this pass the boundary token skips too; InsertBoundaryRecompute gives it its way back.
POP, arXiv 2602.03295, section 3.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from . import ops
from .base import Pass
from .graph import call_nodes, emit, find, layer_of
from .layers import layer_input, layer_output, runs_of


class PrunePrefill(Pass):
    stages = ("prefill",)

    def __init__(self, layers: Iterable[int]) -> None:
        super().__init__()
        self.layers = sorted(set(layers))

    def requires(self, graph_module: fx.GraphModule) -> None:
        unknown = [layer for layer in self.layers if not 0 <= layer < self.program.num_layers]
        self.check(not unknown, f"the model has {self.program.num_layers} layers, asked to prune {unknown}")
        self.check(len(find(graph_module, op=ops.attention)) == self.program.num_layers, "layers are missing already")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for first, last in runs_of(graph_module, self.layers):
            entry, outputs = layer_input(graph_module, first), range(first, last + 1)
            ends = {layer: layer_output(graph_module, layer) for layer in outputs}
            with graph_module.graph.inserting_after(ends[last]):
                skip = emit(graph_module.graph, ops.skip_layers, entry, first, last, like=ends[last])
            skip.meta["role"] = "skip"
            for layer, end in ends.items():
                by = skip if layer == last else entry
                for user in [u for u in end.users if layer_of(u) != layer]:
                    user.replace_input_with(end, by)
                self.matches += 1
            skip.args = (entry, first, last)
        graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        left = [layer_of(n) for n in find(graph_module, op=ops.attention)]
        self.check(not set(left) & set(self.layers), "a pruned layer still attends")
        caches = {layer_of(n) for n in call_nodes(graph_module) if n.target == ops.append_kv}
        self.check(caches == set(range(self.program.num_layers)), "a layer lost its K/V cache entry")
