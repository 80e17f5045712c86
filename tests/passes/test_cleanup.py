"""Cleanup merges calls that compute the same, and no others."""

from __future__ import annotations

import torch
from torch import fx

from popcompile.passes.cleanup import Cleanup

aten = torch.ops.aten


def test_equal_calls_become_one() -> None:
    """Also those whose arguments are equal once others are merged; 1, 1.0 and True give three types of tensor."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    sums = [graph.call_function(aten.add.Tensor, (x, number)) for number in (1, 1, 1.0, True)]
    doubled = [graph.call_function(aten.cat.default, ([x, one],)) for one in sums]
    unread = graph.call_function(aten.neg.default, (x,))
    graph.output(tuple(doubled))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    expected = gm(torch.arange(3))

    cleanup = Cleanup()
    cleaned = cleanup(gm).graph_module
    cleaned.recompile()
    calls = [node for node in cleaned.graph.nodes if node.op == "call_function"]
    assert (len(calls), cleanup.matches) == (6, 3) and unread not in calls
    found = cleaned(torch.arange(3))
    assert [t.dtype for t in found] == [t.dtype for t in expected]
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(found, expected, strict=True))
