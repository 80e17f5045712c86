"""Fuse the element-wise steps of RMSNorm into one node.

    pow -> mean -> add eps -> rsqrt -> mul x -> (cast) -> mul weight   =>   rms_norm(x, weight, eps)

One kernel in place of six memory-bound ones. The weight may be an expression of parameters (Gemma's 1 + weight);
FoldParameters turns it into an initializer later.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from . import ops
from .base import Pass
from .graph import dependencies, emit, find, replace, shape_of, value_of

aten = torch.ops.aten
_CASTS = {aten.to.dtype, aten._to_copy.default, aten.type_as.default}


class FuseRMSNorm(Pass):
    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for rsqrt in find(graph_module, op=aten.rsqrt.default):
            if (norm := _match(rsqrt)) is None:
                continue
            with rsqrt.graph.inserting_before(norm.scaled):
                fused = emit(rsqrt.graph, ops.rms_norm, norm.source, norm.weight, norm.eps, like=norm.normed)
            replace(norm.result, fused)
            self.matches += 1
        graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        left = [rsqrt.name for rsqrt in find(graph_module, op=aten.rsqrt.default) if _match(rsqrt)]
        self.check(not left, f"the norms of {left} are left in steps")


class _Norm(NamedTuple):
    """normed: source / rms(source). scaled: that by the weight. result: that in the source's dtype."""

    source: fx.Node
    weight: fx.Node
    eps: float
    normed: fx.Node
    scaled: fx.Node
    result: fx.Node


def _match(rsqrt: fx.Node) -> _Norm | None:
    """The norm around one rsqrt; None where it is something else."""
    add = rsqrt.args[0]
    if not _is(add, aten.add.Tensor) or not isinstance(eps := add.args[1], float):
        return None
    mean = add.args[0]
    if not _is(mean, aten.mean.dim) or list(mean.args[1]) != [-1]:
        return None
    square = mean.args[0]
    if not _is(square, aten.pow.Tensor_Scalar) or square.args[1] != 2:
        return None
    x = square.args[0]
    normed = _single_user(rsqrt)
    if not _is(normed, aten.mul.Tensor) or set(normed.args) != {x, rsqrt}:
        return None
    after = _skip_casts_forward(normed)
    scaled = _single_user(after)
    if not _is(scaled, aten.mul.Tensor):
        return None
    weight = scaled.args[1] if scaled.args[0] is after else scaled.args[0]
    if not isinstance(weight, fx.Node) or len(shape_of(weight)) != 1 or not _is_parameter(weight):
        return None
    result = _skip_casts_forward(scaled)
    source = _skip_casts_back(x)
    if value_of(source).dtype != value_of(result).dtype:
        return None
    return _Norm(source, weight, eps, normed, scaled, result)


def _is(node: object, target: Callable[..., object]) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target == target


def _single_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _skip_casts_forward(node: fx.Node) -> fx.Node:
    while (user := _single_user(node)) is not None and user.target in _CASTS and user.args[0] is node:
        node = user
    return node


def _skip_casts_back(node: fx.Node) -> fx.Node:
    while node.target in _CASTS:
        node = node.args[0]
    return node


def _is_parameter(node: fx.Node) -> bool:
    """Computed from parameters alone."""
    return all(n.op in ("get_attr", "call_function") for n in dependencies([node], lambda n: True))
