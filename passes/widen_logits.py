"""Return bf16 logits in fp32: bf16 ranks few of them apart, and runtimes that load packages read none.

logits = linear(norm, lm_head)  # bf16   ->   logits, to(logits, float32)
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from .base import Pass
from .graph import emit, outputs_of, value_of

aten = torch.ops.aten


class WidenLogits(Pass):
    stages = ("prefill", "decode")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        logits = outputs_of(graph_module)[0]
        if value_of(logits).dtype == torch.bfloat16:
            with graph_module.graph.inserting_after(logits):
                wide = emit(graph_module.graph, aten.to.dtype, logits, torch.float32, like=logits)
            logits.replace_all_uses_with(wide, delete_user_cb=lambda user: user.op == "output")
            self.matches += 1
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        self.check(value_of(outputs_of(graph_module)[0]).dtype != torch.bfloat16, "the logits are in bf16")
