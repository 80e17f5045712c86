"""Fuse the element-wise steps of RMSNorm into one node.

    pow -> mean -> add eps -> rsqrt -> mul x -> (cast) -> mul weight   =>   rms_norm(x, weight, eps)

One kernel in place of six memory-bound ones. The weight may be an expression of parameters (Gemma's 1 + weight);
FoldParameters turns it into an initializer later.
"""

from __future__ import annotations

from collections.abc import Callable

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
            if self._fuse(rsqrt):
                self.matches += 1
        graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        self.check(len(find(graph_module, op=ops.rms_norm)) >= self.matches, "a fused norm is missing")

    @staticmethod
    def _fuse(rsqrt: fx.Node) -> bool:
        """Replace the pattern around one rsqrt; False where it is something else."""
        add = rsqrt.args[0]
        if not _is(add, aten.add.Tensor) or not isinstance(eps := add.args[1], float):
            return False
        mean = add.args[0]
        if not _is(mean, aten.mean.dim) or list(mean.args[1]) != [-1]:
            return False
        square = mean.args[0]
        if not _is(square, aten.pow.Tensor_Scalar) or square.args[1] != 2:
            return False
        x = square.args[0]
        normed = _single_user(rsqrt)
        if not _is(normed, aten.mul.Tensor) or set(normed.args) != {x, rsqrt}:
            return False
        after = _skip_casts_forward(normed)
        scaled = _single_user(after)
        if not _is(scaled, aten.mul.Tensor):
            return False
        weight = scaled.args[1] if scaled.args[0] is after else scaled.args[0]
        if not isinstance(weight, fx.Node) or len(shape_of(weight)) != 1 or not _is_parameter(weight):
            return False
        result = _skip_casts_forward(scaled)
        source = _skip_casts_back(x)
        if value_of(source).dtype != value_of(result).dtype:
            return False
        with rsqrt.graph.inserting_before(scaled):
            fused = emit(rsqrt.graph, ops.rms_norm, source, weight, eps, like=normed)
        replace(result, fused)
        return True


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
