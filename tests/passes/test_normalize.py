"""Operators that change a part of a tensor become functions of the whole."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from popcompile.passes import ContractError
from popcompile.passes.normalize import Normalize


def traced(function: Callable[[Tensor], object]) -> fx.GraphModule:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> object:
            return function(x)

    return torch.export.export(Module(), (torch.ones(3, 2, 8),), strict=False).module(check_guards=False)


def sections(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """As Qwen3-VL's M-RoPE takes every third column from another row."""
    x = x * 2
    first = x[0]
    first[..., 1:6:3] = x[1, ..., 1:6:3]
    first[..., 2:6:3] = x[2, ..., 2:6:3]
    return first, x, x[0] + 1


def one_after_another(x: Tensor) -> Tensor:
    x = x + 1
    x[1].add_(x[0])
    x[2, :, 3:] *= 2
    x[1, 0].copy_(x[2, 1])
    return x.sum(0)


@pytest.mark.parametrize("function", [sections, one_after_another])
def test_changes_of_parts(function: Callable[[Tensor], object]) -> None:
    graph_module = traced(function)
    Normalize()(graph_module)
    graph_module.recompile()
    x = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(graph_module(x), function(x), atol=0, rtol=0)


def test_a_view_that_is_read_afterwards() -> None:
    def changed(x: Tensor) -> Tensor:
        x = x + 1
        flat = x.view(6, 8)
        x[0].add_(1)
        return flat

    with pytest.raises(ContractError, match=r"add_ changes what \['view'\] show"):
        Normalize()(traced(changed))
