"""Split the traced graph into a prefill and a decode graph.

Both start as the same graph over the same parameters. Decode stays the unchanged model; the passes that follow
rewrite prefill.
"""

from __future__ import annotations

from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from .base import Pass
from .graph import clone_module


class SplitStages(Pass):
    def requires(self, graph_module: fx.GraphModule) -> None:
        self.check(not {"prefill", "decode"} & set(self.program.graphs), "the program is split already")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        others = {stage: gm for stage, gm in self.program.graphs.items() if stage != "model"}
        self.program.graphs.clear()
        self.program.graphs.update(prefill=graph_module, decode=clone_module(graph_module), **others)
        self.matches = 2
        return PassResult(graph_module, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        prefill, decode = (self.program.graphs[s].graph for s in ("prefill", "decode"))
        self.check([n.name for n in prefill.nodes] == [n.name for n in decode.nodes], "the stages differ already")
