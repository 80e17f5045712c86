"""Drop what tracing leaves behind and computes nothing, and write in-place operators as functions.

Metadata assertions, casts to the dtype a tensor already has, dropout in evaluation, full slices, aliases, parts of a
concatenation that are empty:

    to = aten.to(x, float32)  # x is float32   ->   x
    cat = aten.cat([x, x[..., 16:]], -1)  # x has 16 features   ->   x
    div_ = aten.div_(x, y)                     ->   div = aten.div(x, y), which is read where x was from there on
    part = aten.select(x, 0, 0)                     part = aten.select(x, 0, 0)
    copy_ = aten.copy_(part, y)                ->   copy = aten.copy(part, y); x' = aten.select_scatter(x, copy, 0, 0)

An operator that changes its input counts as read: it would keep the layer that it is in from being pruned.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from popcompile.upstream import changes_its_input, operator_name, overload_name, shares_its_input

from .base import Pass
from .graph import call_nodes, emit, replace, set_value, shape_of

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
#: views of a part of a tensor -> the operators that put a part back, with the same arguments after the part
_PUT_BACK = {aten.select.int: aten.select_scatter.default, aten.slice.Tensor: aten.slice_scatter.default}
_ASSERTIONS = {aten._assert_tensor_metadata.default}


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
        parts = [node.args[0]]  # what is changed, and what that is a part of
        while parts[-1].target in _PUT_BACK:
            parts.append(parts[-1].args[0])
        shared = [parts[-1]] if _is_view(parts[-1]) else [n for n in _views(parts, node) if n not in parts]
        self.check(not shared, f"{node.name} changes what {[n.name for n in shared]} show")
        name, overload = operator_name(node.target), overload_name(node.target)
        node.target = getattr(getattr(aten, name.removesuffix("_")), overload)
        set_value(node)
        later = {part: [user for user in part.users if user > node] for part in parts}
        value = node
        for part, whole in pairwise(parts):
            with node.graph.inserting_after(value):
                value = emit(node.graph, _PUT_BACK[part.target], whole, value, *part.args[1:], like=part)
        for part in reversed(parts):  # a part is shown again, for it may be changed again
            if part is not parts[-1]:
                with node.graph.inserting_after(value):
                    value = emit(node.graph, part.target, value, *part.args[1:], like=part)
            for user in later[part]:
                user.replace_input_with(part, value)

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


def _is_in_place(node: fx.Node) -> bool:
    return changes_its_input(node.target)


def _views(tensors: list[fx.Node], node: fx.Node) -> list[fx.Node]:
    """What shows memory of the tensors, was made before `node`, and is read after it."""
    views, stack = [], list(tensors)
    while stack:
        made = [n for n in stack.pop().users if n < node and _is_view(n)]
        views += [n for n in made if any(user > node for user in n.users)]
        stack += made
    return views


def _is_view(node: fx.Node) -> bool:
    """Whether a node's value may share memory with an argument."""
    return shares_its_input(node.target)
