"""Drop what tracing leaves behind and computes nothing, and write in-place operators as functions.

Metadata assertions, casts to the dtype a tensor already has, dropout in evaluation, full slices, aliases, parts of a
concatenation that are empty:

    to = aten.to(x, float32)  # x is float32   ->   x
    cat = aten.cat([x, x[..., 16:]], -1)  # x has 16 features   ->   x
    div_ = aten.div_(x, y)                     ->   div = aten.div(x, y), which is read where x was from there on
    copy_ = aten.copy_(x[0][..., 1:6:3], y)    ->   x with y in that place, by slice_scatter and select_scatter

An operator that changes its input counts as read: it would keep the layer that it is in from being pruned.
"""

from __future__ import annotations

import operator

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from popcompile.upstream import changes_its_input, operator_name, overload_name, shares_its_input

from .base import Pass
from .graph import call_nodes, emit, replace, shape_of, value_of

aten = torch.ops.aten

#: operators that return their first argument unchanged whenever shape and dtype are unchanged
_IDENTITIES = {
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.type_as.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
    aten.detach.default,
    aten.detach_.default,
    aten.lift_fresh_copy.default,
    aten.expand.default,
    aten.slice.Tensor,
    aten.view.default,
    aten.reshape.default,
}
_ASSERTIONS = {aten._assert_tensor_metadata.default}
#: views of a part of a tensor -> the tensor with another value of that part
_SCATTERS = {aten.slice.Tensor: aten.slice_scatter.default, aten.select.int: aten.select_scatter.default}


class Normalize(Pass):
    def requires(self, graph_module: fx.GraphModule) -> None:
        self.check(
            all(n.op in ("placeholder", "get_attr", "call_function", "output") for n in graph_module.graph.nodes),
            "the graph must be one flat torch.export graph",
        )

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for node in call_nodes(graph_module):
            if node.target in _ASSERTIONS:
                graph_module.graph.erase_node(node)
                self.matches += 1
            elif self._is_identity(node):
                replace(node, node.args[0])
                self.matches += 1
            elif node.target == aten.cat.default and (parts := _parts(node)) != list(node.args[0]):
                if len(parts) == 1:
                    replace(node, parts[0])
                else:
                    node.update_arg(0, parts)
                self.matches += 1
            elif _is_in_place(node):
                self._make_functional(node)
                self.matches += 1
        graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        self.check(
            not any(
                n.target in _ASSERTIONS or self._is_identity(n) or _is_in_place(n) for n in call_nodes(graph_module)
            ),
            "an identity or an in-place operator is left",
        )

    def _make_functional(self, node: fx.Node) -> None:
        """Write a change of a tensor, or of a part of one, as a function of it, which is read from there on.

        So are the tensor that the part is of, and what shows it: their views are made anew.
        """
        with node.graph.inserting_before(node):
            value, whole = _changed(node), node.args[0]
            while whole.target in _SCATTERS:
                part, (whole, *place) = whole, whole.args
                value = emit(node.graph, _SCATTERS[part.target], whole, value, *place, like=part)
            self.check(not _is_view(whole), f"{node.name} changes what {whole.name} shows")
            changed = {whole: value}
            for view in _views_before(node):
                if view.args[0] in changed:
                    base = changed[view.args[0]]
                    changed[view] = emit(node.graph, view.target, base, *view.args[1:], like=view, **view.kwargs)
        changed[node] = changed[node.args[0]]
        for before, after in changed.items():
            before.replace_all_uses_with(after, lambda user: user > node)
        node.graph.erase_node(node)

    @staticmethod
    def _is_identity(node: fx.Node) -> bool:
        if node.target == aten.dropout.default:
            return node.args[2] is False
        if node.target not in _IDENTITIES:
            return False
        before, after = node.args[0].meta["val"], node.meta["val"]
        return before.dtype == after.dtype and tuple(before.shape) == tuple(after.shape)


def _parts(cat: fx.Node) -> list[fx.Node]:
    """What a concatenation joins, without what is empty."""
    parts, dim = list(cat.args[0]), cat.args[1] if len(cat.args) > 1 else 0
    return [part for part in parts if shape_of(part)[dim] != 0] or parts


def _changed(node: fx.Node) -> fx.Node:
    """What an in-place operator makes of its input, by the operator that leaves the input as it is."""
    if node.target == aten.copy_.default:
        part, value = node.args[:2]
        if shape_of(part) == shape_of(value) and value_of(part).dtype == value_of(value).dtype:
            return value
    name, overload = operator_name(node.target), overload_name(node.target)
    function = getattr(getattr(aten, name.removesuffix("_")), overload)
    return emit(node.graph, function, *node.args, like=node, **node.kwargs)


def _views_before(node: fx.Node) -> list[fx.Node]:
    """What may share memory with another value, in graph order."""
    return [n for n in node.graph.nodes if n < node and (_is_view(n) or n.target is operator.getitem)]


def _is_in_place(node: fx.Node) -> bool:
    return changes_its_input(node.target)


def _is_view(node: fx.Node) -> bool:
    """Whether a node's value may share memory with an argument."""
    return shares_its_input(node.target)
