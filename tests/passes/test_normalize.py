"""Operators that change a tensor, or a part of one, come out of Normalize as functions, and compute the same."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from popcompile.passes.graph import call_nodes
from popcompile.passes.normalize import Normalize
from popcompile.upstream import changes_its_input


def into_a_slice(x: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    y[..., 1:6:3] = x[..., :2]
    return (y,)


def into_a_slice_of_one(x: Tensor) -> tuple[Tensor, ...]:
    """As M-RoPE's sections are put together: what is written shows in the whole."""
    y = x * 2
    first = y[0]
    for axis in (1, 2):
        first[..., axis:7:3] = y[axis, ..., axis:7:3]
    return first + 1, y


def into_what_is_read_before_and_after(x: Tensor) -> tuple[Tensor, ...]:
    y = x * 2
    before = y.sin()
    y[:, 1] = x[:, 0]
    y[:, 2] = y[:, 1] + 1
    return before, y.cos()


def into_what_others_show(x: Tensor) -> tuple[Tensor, ...]:
    """Views of the whole that were made before: other parts, a transposed one, parts of a split."""
    y = x * 2
    row, column, (first, second) = y[1], y[:, :, 0], y.transpose(0, 1).split(2)
    seen = row + 1
    y[1, :, 2:4] = x[0, :, :2]
    return row, column, first, second * 2, seen


def by_other_operators(x: Tensor) -> tuple[Tensor, ...]:
    y = x + 1
    y[1].add_(y[0])
    y[2, :, 3:] *= 2
    y[1, 0].copy_(y[2, 1])
    return (y.sum(0),)


class Module(nn.Module):
    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return self.function(x)


@pytest.mark.parametrize(
    "function",
    [into_a_slice, into_a_slice_of_one, into_what_is_read_before_and_after, into_what_others_show, by_other_operators],
)
def test_changes_become_functions(function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    x = torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(0))
    gm = torch.export.export(Module(function), (x,), strict=False).module(check_guards=False)
    gm.graph.set_codegen(fx.graph.CodeGen())
    assert any(changes_its_input(n.target) for n in call_nodes(gm))
    result = Normalize()(gm)
    assert result is not None
    result.graph_module.recompile()
    assert not any(changes_its_input(n.target) for n in call_nodes(gm))
    for ours, theirs in zip(result.graph_module(x), function(x), strict=True):
        assert torch.equal(ours, theirs)
