"""Remove dead code, parameters that nobody reads, and expressions that are computed twice."""

from __future__ import annotations

from torch import fx
from torch.fx.passes.dialect.common.cse_pass import CSEPass
from torch.fx.passes.infra.pass_base import PassResult

from .base import Pass
from .graph import call_nodes


class Cleanup(Pass):
    stages = ("model", "prefill", "decode")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        before = len(call_nodes(graph_module))
        graph_module.graph.eliminate_dead_code()
        result = CSEPass()(graph_module)
        assert result is not None
        cleaned = result.graph_module
        cleaned.graph.eliminate_dead_code()
        cleaned.meta = dict(graph_module.meta)
        self.matches += before - len(call_nodes(cleaned))
        return PassResult(cleaned, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        self.check_form(graph_module)
