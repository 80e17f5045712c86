"""Run the boundary token, or a window of tokens that ends with it, through the pruned layers.

The last prompt token predicts the first new one, so it takes the whole model (POP, arXiv 2602.03295, section 3.3).
For each run of pruned layers:

    b = select_boundary(x)
    b = layer(b)                  for each layer of the run, attending to the projected K/V and itself
    x = insert_boundary(x, b)

With a window of w tokens it is the last min(w, row length) ones of each row, the tail: select_tail and insert_tail.
What the prompt's end attends to most is then exact, itself and its neighbours, in the cache as well.

The layers are copied from the decode graph. A value that they read from outside with a token dimension (positions,
for instance) is selected at the tail too, so the pass needs to know nothing about the model family. The tail's own K/V
replace its projected ones in the cache.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.fx.node import map_arg
from torch.fx.passes.infra.pass_base import PassResult

from popcompile.upstream import tree_leaves

from . import ops
from .base import Pass
from .contract import ContractError
from .graph import (
    call_nodes,
    dimension_symbols,
    emit,
    find,
    has_symbol,
    layer_of,
    output_of,
    replace,
    role_of,
    shape_of,
    value_of,
)
from .layers import layer_input, layer_output
from .tail import Tail, find_insertions


class InsertBoundaryRecompute(Pass):
    """window: how many tokens of a row's end take the whole model, at least 1."""

    stages = ("prefill",)

    def __init__(self, window: int = 1) -> None:
        super().__init__()
        self.window = window

    def requires(self, graph_module: fx.GraphModule) -> None:
        self.check(self.window >= 1, f"a window of {self.window} tokens has no boundary token")
        self.check("decode" in self.program.graphs, "there is no decode graph to copy layers from")
        self.check(not find_insertions(graph_module), "boundary recompute is inserted already")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        skips = find(graph_module, op=ops.skip_layers)
        if not skips:
            return PassResult(graph_module, False)
        tail = Tail(graph_module, self.window)
        copier = _LayerCopier(self.program.graphs["decode"], graph_module, tail)
        for skip in skips:
            entry, first, last = skip.args
            assert isinstance(entry, fx.Node) and isinstance(first, int) and isinstance(last, int)
            with graph_module.graph.inserting_before(skip):
                boundary = tail.select(entry, like=skip)
                boundary.meta.update(role="boundary", layer=first)
                for layer in range(first, last + 1):
                    boundary = copier.copy(layer, boundary)
                    self.matches += 1
                merged = tail.insert(entry, boundary, like=skip)
            merged.meta["role"] = "boundary"
            replace(skip, merged)
        return PassResult(graph_module, True)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        self.check(not find(graph_module, op=ops.skip_layers), "a run of layers is still skipped by every token")
        layers = sorted(layer_of(n) or 0 for n in find(graph_module, op=ops.attention))
        self.check(layers == list(range(self.program.num_layers)), "the boundary token misses a layer")


class _LayerCopier:
    """Copies layers of the decode graph into the prefill graph, for the tail's tokens."""

    def __init__(self, template: fx.GraphModule, target: fx.GraphModule, tail: Tail) -> None:
        self.template, self.target, self.tail = template, target, tail
        self.by_name = {n.name: n for n in target.graph.nodes}
        self.sequence = dimension_symbols(template)["sequence"]
        self.selected: dict[fx.Node, fx.Node] = {}
        #: the hidden state that the layer being copied is given, whose token dimension is the tail's
        self.entry: fx.Node

    def copy(self, layer: int, boundary: fx.Node) -> fx.Node:
        """Append `layer` for the tail, hidden state [B, tail, hidden]; returns its output."""
        self.entry = boundary
        mapping: dict[fx.Node, Any] = {layer_input(self.template, layer): boundary}
        end = layer_output(self.template, layer)
        for node in call_nodes(self.template):
            if layer_of(node) != layer:
                continue
            args, kwargs = map_arg((node.args, node.kwargs), lambda n: self._map(n, mapping))
            if node.target == ops.append_kv:
                mapping[node] = self._write_cache(node, args)
            elif not any(isinstance(a, fx.Node) for a in tree_leaves((args, kwargs))):
                mapping[node] = node.target(*args, **kwargs)
            else:
                mapping[node] = copied = emit(self.target.graph, node.target, *args, like=node, **kwargs)
                copied.meta["role"] = "boundary" + (f"/{role}" if (role := role_of(node)) else "")
        return mapping[end]

    def _write_cache(self, append: fx.Node, args: tuple[Any, ...]) -> fx.Node:
        """The tail's own keys or values, over its projected ones, in what the stage returns as the cache."""
        projected = self.by_name[append.name]
        written = emit(self.target.graph, ops.write_kv, projected, args[1], args[2], like=append)
        output_of(self.target).replace_input_with(projected, written)
        return written

    def _map(self, node: fx.Node, mapping: dict[fx.Node, Any]) -> Any:
        """A template value in the target graph: one of the copied layer, or one from outside, at the tail."""
        if node in mapping:
            return mapping[node]
        if node.op == "get_attr":
            return self._parameter(node)
        value = value_of(node)
        if isinstance(value, int | torch.SymInt):
            return self._size(node)
        outside = self._outside(node)
        if node.op == "placeholder" or not any(has_symbol(d, self.sequence) for d in shape_of(node)):
            return outside
        if not has_symbol(shape_of(node)[1], self.sequence):
            raise ContractError(f"{node.name} {shape_of(node)}: its token dimension is not dimension 1")
        if outside not in self.selected:
            with self.target.graph.inserting_after(max(outside, self.tail.first)):
                self.selected[outside] = self.tail.select(outside)
        return self.selected[outside]

    def _outside(self, node: fx.Node) -> fx.Node:
        """A template value of no layer in the target graph, where it may be gone since no other layer reads it."""
        if node.name not in self.by_name:
            if node.op == "get_attr":
                return self._parameter(node)
            args, kwargs = map_arg((node.args, node.kwargs), self._outside)
            self.by_name[node.name] = emit(self.target.graph, node.target, *args, like=node, **kwargs)
        return self.by_name[node.name]

    def _parameter(self, node: fx.Node) -> fx.Node:
        if node.name not in self.by_name:
            first = next(n for n in self.target.graph.nodes if n.op != "placeholder")
            with self.target.graph.inserting_before(first):
                self.by_name[node.name] = self.target.graph.node_copy(node)
        return self.by_name[node.name]

    def _size(self, node: fx.Node) -> Any:
        """A size that the layer reads: the number of tokens becomes the tail's."""
        value = value_of(node)
        if not has_symbol(value, self.sequence):
            return self.by_name.get(node.name, value)
        count = shape_of(self.entry)[1]
        expression = value.node.expr.subs(self.sequence, count.node.expr if isinstance(count, torch.SymInt) else count)
        if expression.is_number:
            return int(expression)
        for other in self.target.graph.nodes:
            size = other.meta.get("val")
            if isinstance(size, torch.SymInt) and size.node.expr == expression:
                return other
        if isinstance(count, torch.SymInt) and count.node.expr == expression:
            with self.target.graph.inserting_after(self.entry):
                return emit(self.target.graph, torch.ops.aten.sym_size.int, self.entry, 1)
        raise ContractError(f"{node.name} = {value}: no such size for a tail")
