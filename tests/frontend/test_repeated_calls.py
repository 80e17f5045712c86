"""What tracing computes once for calls that are alike is what torch.export computes for each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import tiny_gemma3, tiny_moe
from steps import numbered
from torch import Tensor, nn
from transformers import PreTrainedConfig

from popcompile.frontend import tracing
from popcompile.passes.fake_values import alike
from popcompile.passes.printing import print_graph
from popcompile.upstream import export


@pytest.mark.parametrize("config", [tiny_gemma3(), tiny_moe()], ids=["gemma3", "moe"])
def test_graphs_and_shapes_are_the_same(config: PreTrainedConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    def plain(module: nn.Module, arguments: Any, shapes: Any, alike: Any) -> torch.export.ExportedProgram:
        return torch.export.export(module, arguments, dynamic_shapes=shapes, strict=False)

    ours = tracing.trace(config, trust_remote_code=True)  # which no earlier trace answers
    monkeypatch.setattr(tracing, "export", plain)
    theirs = tracing.trace(config, trust_remote_code=True)
    texts = [numbered(print_graph(program.graphs["model"], "model")) for program in (ours, theirs)]
    assert texts[0] == texts[1] and "batch" in texts[0]


class Found(nn.Module):
    """How many there are of each is known when it runs."""

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.nonzero(), y.nonzero()


class Changed(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return x.clone().add_(1), y.clone().add_(1)


def test_shapes_that_values_decide_are_found_each_time() -> None:
    rows = torch.export.Dim("rows")
    given = (torch.ones(4), torch.ones(4))
    program = export(Found(), given, ({0: rows}, {0: rows}), alike)
    first, second = (node.meta["val"].shape[0] for node in program.graph.output_node().args[0])
    assert first.node.expr != second.node.expr


def test_tensors_that_are_changed_are_their_own() -> None:
    rows = torch.export.Dim("rows")
    program = export(Changed(), (torch.ones(4), torch.ones(4)), ({0: rows}, {0: rows}), alike)
    x = torch.arange(3.0)
    first, second = program.module(check_guards=False)(x, 10 * x)
    assert first.tolist() == [1, 2, 3] and second.tolist() == [1, 11, 21]
