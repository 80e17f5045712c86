"""How PyTorch's operators are written in ONNX, and ONNX's own, which passes put into a graph.

https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.onnx.ops import symbolic, symbolic_multi_out

from popcompile.passes.graph import shape_of, value_of

from .rules import Rules, arguments, counted, dtype_of, reshape, same_size
from .writer import Rule, Writer

aten = torch.ops.aten
RULES = Rules()
rule = RULES.of


# --- ONNX's own --------------------------------------------------------------------------------------------------


@rule(symbolic, symbolic_multi_out)
def _onnx(w: Writer, node: fx.Node) -> Any:
    name, inputs, attributes = node.args
    domain, _, op = str(name).rpartition("::")
    outputs = len(value_of(node)) if node.target == symbolic_multi_out else None
    made = w(op, *(w[i] for i in inputs), domain=domain, outputs=outputs, **attributes)
    if op == "SkipSimplifiedLayerNormalization":  # mean and inverse deviation are for training; no kernel makes them
        read = {user.args[1] for user in node.users}
        for i, value in enumerate(made):
            value.name = value.name if i in read else ""
    return made


@rule(operator.getitem)
def _getitem(w: Writer, node: fx.Node) -> Any:
    values, index = node.args
    return w[values][index]


# --- element by element ------------------------------------------------------------------------------------------


def _unary(op: str) -> Rule:
    return lambda w, node: w(op, w[node.args[0]])


def _binary(op: str) -> Rule:
    def written(w: Writer, node: fx.Node) -> Any:
        if node.kwargs:
            return NotImplemented
        return w(op, *(w.operand(argument, dtype_of(node)) for argument in node.args[:2]))

    return written


for _target, _op in {
    aten.abs: "Abs", aten.cos: "Cos", aten.sin: "Sin", aten.log: "Log", aten.sigmoid: "Sigmoid", aten.tanh: "Tanh",
    aten.bitwise_not: "Not", aten.neg: "Neg", aten.floor: "Floor",
}.items():  # fmt: skip
    RULES[_target.default] = _unary(_op)
for _target, _op in {aten.add: "Add", aten.sub: "Sub", aten.mul: "Mul", aten.div: "Div"}.items():
    RULES[_target.Tensor] = _binary(_op)
RULES[aten.logical_or.default] = _binary("Or")


def _whole(op: str) -> Rule:
    """Of integers that are not negative, by positive ones."""

    def written(w: Writer, node: fx.Node) -> Any:
        if dtype_of(node).is_floating_point:
            return NotImplemented
        return w(op, *(w.operand(argument, dtype_of(node)) for argument in node.args))

    return written


@rule(aten.rsub.Scalar)
def _subtracted_from(w: Writer, node: fx.Node) -> Any:
    if len(node.args) > 2:
        return NotImplemented
    x, number = node.args
    return w("Sub", w.operand(number, dtype_of(node)), w[x], dtype=dtype_of(node))


RULES |= {aten.floor_divide.default: _whole("Div")}
RULES |= {aten.remainder.Tensor: _whole("Mod"), aten.remainder.Scalar: _whole("Mod")}


@rule(aten.clamp.default)
def _clamp(w: Writer, node: fx.Node) -> Any:
    x, least, most = arguments(node, self=None, min=None, max=None)
    value = w[x]
    for op, bound in (("Max", least), ("Min", most)):
        value = value if bound is None else w(op, value, w.operand(bound, dtype_of(node)))
    return value


@rule(aten.eq.Scalar)
def _equal(w: Writer, node: fx.Node) -> Any:
    x, other = node.args
    return w("Equal", w[x], w.operand(other, dtype_of(x)), dtype=torch.bool)


@rule(aten.silu.default)
def _silu(w: Writer, node: fx.Node) -> Any:
    x = w[node.args[0]]
    return w("Mul", x, w("Sigmoid", x))


@rule(aten.gelu.default)
def _gelu(w: Writer, node: fx.Node) -> Any:
    return w("Gelu", w[node.args[0]], approximate=node.kwargs.get("approximate", "none"))


@rule(aten.to.dtype)
def _to(w: Writer, node: fx.Node) -> Any:
    return w.cast(w[node.args[0]], dtype_of(node))


@rule(aten.gt.Scalar)
def _greater(w: Writer, node: fx.Node) -> Any:
    x, bound = node.args
    return w("Greater", w[x], w.operand(bound, dtype_of(x)), dtype=torch.bool)


@rule(aten.where.self)
def _where(w: Writer, node: fx.Node) -> Any:
    condition, *values = node.args
    return w("Where", w[condition], *(w.operand(value, dtype_of(node)) for value in values), dtype=dtype_of(node))


@rule(aten.masked_fill.Scalar)
def _masked_fill(w: Writer, node: fx.Node) -> Any:
    x, mask, value = node.args
    return w("Where", w[mask], w.constant(value, dtype_of(node)), w[x], dtype=dtype_of(node))


@rule(aten.matmul.default)
def _matmul(w: Writer, node: fx.Node) -> Any:
    return w("MatMul", *(w[argument] for argument in node.args))


@rule(aten.addmm.default)
def _addmm(w: Writer, node: fx.Node) -> Any:
    if node.kwargs:
        return NotImplemented
    bias, x, weight = node.args
    return w("Gemm", w[x], w[weight], w[bias])


@rule(aten.pow.Tensor_Scalar)
def _pow(w: Writer, node: fx.Node) -> Any:
    return w("Pow", *(w.operand(argument, dtype_of(node)) for argument in node.args))


# --- reductions --------------------------------------------------------------------------------------------------


@rule(aten.sum.dim_IntList)
def _sum(w: Writer, node: fx.Node) -> Any:
    x, axes, keep = arguments(node, self=None, dim=None, keepdim=False)
    return w("ReduceSum", w.cast(w[x], dtype_of(node)), w.constant(list(axes)), keepdims=int(keep))


@rule(aten.amax.default)
def _amax(w: Writer, node: fx.Node) -> Any:
    x, axes, keep = arguments(node, self=None, dim=(), keepdim=False)
    return w("ReduceMax", w[x], w.constant(list(axes)), keepdims=int(keep))


@rule(aten.max.default)
def _max(w: Writer, node: fx.Node) -> Any:
    return w("ReduceMax", w[node.args[0]], keepdims=0)


@rule(aten.softmax.int)
def _softmax(w: Writer, node: fx.Node) -> Any:
    x, axis = node.args[:2]
    return w("Softmax", w.cast(w[x], dtype_of(node)), axis=axis)


@rule(aten.topk.default)
def _topk(w: Writer, node: fx.Node) -> Any:
    x, k, axis, largest, ordered = arguments(node, self=None, k=None, dim=-1, largest=True, sorted=True)
    return w("TopK", w[x], w.constant([k]), axis=axis, largest=int(largest), sorted=int(ordered), outputs=2)


@rule(aten.layer_norm.default)
def _layer_norm(w: Writer, node: fx.Node) -> Any:
    x, shape, weight, bias, epsilon = arguments(
        node, input=None, normalized_shape=None, weight=None, bias=None, eps=1e-5
    )
    if weight is None:
        return NotImplemented
    return w("LayerNormalization", w[x], w[weight], w[bias], axis=-len(shape), epsilon=epsilon, stash_type=1)


# --- shapes ------------------------------------------------------------------------------------------------------


@rule(aten.view.default, aten.reshape.default)
def _view(w: Writer, node: fx.Node) -> Any:
    x, sizes = node.args[:2]
    return reshape(w, x, node, None if -1 in sizes else sizes)


@rule(aten.flatten.using_ints)
def _flatten(w: Writer, node: fx.Node) -> Any:
    return reshape(w, node.args[0], node)


@rule(aten.transpose.int)
def _transpose(w: Writer, node: fx.Node) -> Any:
    x, one, other = node.args
    order = list(range(len(shape_of(x))))
    order[one], order[other] = order[other], order[one]
    return w("Transpose", w[x], perm=order)


@rule(aten.unsqueeze.default)
def _unsqueeze(w: Writer, node: fx.Node) -> Any:
    x, axis = node.args
    return w("Unsqueeze", w[x], w.constant([axis]))


@rule(aten.expand.default)
def _expand(w: Writer, node: fx.Node) -> Any:
    x, sizes = node.args[:2]
    before = shape_of(x)
    before = (*[1] * (len(sizes) - len(before)), *before)
    kept = [same_size(a, b) for a, b in zip(before, shape_of(node), strict=True)]
    return w("Expand", w[x], w.sizes([1 if same else size for same, size in zip(kept, sizes, strict=True)]))


@rule(aten.slice.Tensor)
def _slice(w: Writer, node: fx.Node) -> Any:
    x, axis, start, end, step = arguments(node, self=None, dim=0, start=None, end=None, step=1)
    bounds = [w.size(0 if start is None else start), w.size(2**63 - 1 if end is None else end)]
    return w("Slice", w[x], *bounds, w.constant([axis]), w.constant([step]))


@rule(aten.cat.default)
def _cat(w: Writer, node: fx.Node) -> Any:
    parts, axis = arguments(node, tensors=None, dim=0)
    return w("Concat", *(w.operand(part, dtype_of(node)) for part in parts), axis=axis)


@rule(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
def _split(w: Writer, node: fx.Node) -> Any:
    x, _, axis = arguments(node, self=None, sizes=None, dim=0)
    parts = [int(part.shape[axis]) for part in value_of(node)]
    return w("Split", w[x], w.constant(parts), axis=axis, outputs=len(parts))


@rule(aten.full.default)
def _full(w: Writer, node: fx.Node) -> Any:
    sizes, value = node.args
    filled = w.operand(value, dtype_of(node))
    return w("Expand", filled, w.sizes(sizes)) if sizes else filled


@rule(aten.arange.default)
def _arange(w: Writer, node: fx.Node) -> Any:
    (end,) = node.args
    if isinstance(end, float) or dtype_of(node) != torch.int64:
        return NotImplemented
    return counted(w, w.size(end))


@rule(aten.pad.default)
def _pad(w: Writer, node: fx.Node) -> Any:
    x, sizes, mode, value = arguments(node, self=None, pad=None, mode="constant", value=None)
    if mode != "constant" or not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    axes = [-1 - i for i in range(len(sizes) // 2)]
    return w(
        "Pad", w[x], w.constant([*sizes[::2], *sizes[1::2]]), w.constant(value or 0.0, dtype_of(node)), w.constant(axes)
    )


@rule(aten.full_like.default, aten.zeros_like.default)
def _full_like(w: Writer, node: fx.Node) -> Any:
    x, value = arguments(node, self=None, fill_value=0)
    return w("Expand", w.constant(value, dtype_of(node)), w.sizes_of(w[x]))


# --- by index ----------------------------------------------------------------------------------------------------


@rule(aten.embedding.default)
def _embedding(w: Writer, node: fx.Node) -> Any:
    weight, ids = node.args[:2]
    return w("Gather", w[weight], w[ids], axis=0)


@rule(aten.gather.default)
def _gather(w: Writer, node: fx.Node) -> Any:
    x, axis, index = node.args
    return w("GatherElements", w[x], w[index], axis=axis)


@rule(aten.scatter.src)
def _scatter(w: Writer, node: fx.Node) -> Any:
    x, axis, index, source = node.args
    return w("ScatterElements", w[x], w[index], w[source], axis=axis)


@rule(aten.scatter.value)
def _scatter_value(w: Writer, node: fx.Node) -> Any:
    x, axis, index, value = node.args
    source = w("Expand", w.constant(value, dtype_of(node)), w.sizes_of(w[index]))
    return w("ScatterElements", w[x], w[index], source, axis=axis)


@rule(aten.select.int)
def _select(w: Writer, node: fx.Node) -> Any:
    x, axis, index = node.args
    return w("Gather", w[x], w.constant(index), axis=axis)
