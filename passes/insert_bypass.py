"""Hand on an estimate of what a run of pruned layers would have made of the prompt.

Layers that follow a pruned run read a hidden state that the run never touched. One matrix product for the whole run,
fitted to the whole model's hidden state at the run's end, brings back most of what it would have added:

    x = insert_boundary(x_cut, boundary)   =>   x = insert_boundary(x_cut + linear(x_cut / rms(x_cut)), boundary)

The last run needs none: nothing reads its output but the boundary token's.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from .base import Pass
from .graph import emit, find, layer_of, role_of, shape_of
from .layers import emit_affine, runs_of
from .tail import find_insertions

aten = torch.ops.aten


class InsertBypass(Pass):
    """layers: all pruned ones. bypassed: first layers of the runs with weights `bypass.N.*` in the constants.

    weight [hidden, hidden], bias and sink [hidden].
    """

    stages = ("prefill",)

    def __init__(self, layers: Iterable[int], bypassed: Iterable[int] = ()) -> None:
        super().__init__()
        self.layers = sorted(set(layers))
        #: first layer of each run -> its last one
        self.runs: dict[int, int] = {}
        self.bypassed = sorted(set(bypassed))

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.check("decode" in self.program.graphs, "there is no decode graph, whose layers are whole")
        self.runs = dict(runs_of(self.program.graphs["decode"], self.layers))
        unknown = [first for first in self.bypassed if first not in self.runs]
        self.check(not unknown, f"no run of pruned layers begins at {unknown}")
        merged = {layer_of(n) for n in find_insertions(graph_module)}
        self.check(merged >= {self.runs[first] for first in self.bypassed}, "run InsertBoundaryRecompute first")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for first in self.bypassed:
            merged = find_insertions(graph_module, self.runs[first])[0]
            entry = merged.args[0]
            assert isinstance(entry, fx.Node)
            with graph_module.graph.inserting_before(merged):
                size = int(shape_of(entry)[2])
                added = emit_affine(graph_module, entry, f"bypass.{first}", size, like=merged, role="bypass")
                handed = emit(graph_module.graph, aten.add.Tensor, entry, added, like=merged)
            handed.meta["role"] = "bypass"
            merged.args = (handed, *merged.args[1:])
            self.matches += 1
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        added = [n for n in find(graph_module, op=aten.add.Tensor) if role_of(n) == "bypass"]
        self.check(len(added) == len(self.bypassed), "a run lacks its bypass")
