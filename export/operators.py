"""How each operator that lowering leaves is written in ONNX: PyTorch's, our own (passes/ops.py), and ONNX's themselves.

Our own say in their reference code what they compute; a test holds each rule to it.
https://onnx.ai/onnx/operators/
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import onnx_ir as ir
import torch
from torch import fx
from torch.onnx.ops import symbolic, symbolic_multi_out

from popcompile.passes import ops
from popcompile.passes.graph import shape_of, value_of
from popcompile.passes.onnx_ops import CONTRIB

from .writer import Rule, Writer, reshape, same_size

aten = torch.ops.aten
RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register how these operators are written."""

    def register(written: Rule) -> Rule:
        RULES.update(dict.fromkeys(targets, written))
        return written

    return register


def _arguments(node: fx.Node, **defaults: Any) -> tuple[Any, ...]:
    """A call's first arguments, by the operator's names for them; those that are not given are the defaults."""
    given = dict(zip(defaults, node.args, strict=False)) | node.kwargs
    return tuple(given.get(name, default) for name, default in defaults.items())


def _dtype(node: fx.Node) -> torch.dtype:
    dtype: torch.dtype = value_of(node).dtype
    return dtype


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
        return w(op, *(w.operand(argument, _dtype(node)) for argument in node.args[:2]))

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
        if _dtype(node).is_floating_point:
            return NotImplemented
        return w(op, *(w.operand(argument, _dtype(node)) for argument in node.args))

    return written


@rule(aten.rsub.Scalar)
def _subtracted_from(w: Writer, node: fx.Node) -> Any:
    if len(node.args) > 2:
        return NotImplemented
    x, number = node.args
    return w("Sub", w.operand(number, _dtype(node)), w[x], dtype=_dtype(node))


RULES |= {aten.floor_divide.default: _whole("Div")}
RULES |= {aten.remainder.Tensor: _whole("Mod"), aten.remainder.Scalar: _whole("Mod")}


@rule(aten.clamp.default)
def _clamp(w: Writer, node: fx.Node) -> Any:
    x, least, most = _arguments(node, self=None, min=None, max=None)
    value = w[x]
    for op, bound in (("Max", least), ("Min", most)):
        value = value if bound is None else w(op, value, w.operand(bound, _dtype(node)))
    return value


@rule(aten.eq.Scalar)
def _equal(w: Writer, node: fx.Node) -> Any:
    x, other = node.args
    return w("Equal", w[x], w.operand(other, _dtype(x)), dtype=torch.bool)


@rule(aten.silu.default)
def _silu(w: Writer, node: fx.Node) -> Any:
    x = w[node.args[0]]
    return w("Mul", x, w("Sigmoid", x))


@rule(aten.gelu.default)
def _gelu(w: Writer, node: fx.Node) -> Any:
    return w("Gelu", w[node.args[0]], approximate=node.kwargs.get("approximate", "none"))


@rule(aten.to.dtype)
def _to(w: Writer, node: fx.Node) -> Any:
    return w.cast(w[node.args[0]], _dtype(node))


@rule(aten.gt.Scalar)
def _greater(w: Writer, node: fx.Node) -> Any:
    x, bound = node.args
    return w("Greater", w[x], w.operand(bound, _dtype(x)), dtype=torch.bool)


@rule(aten.where.self)
def _where(w: Writer, node: fx.Node) -> Any:
    condition, *values = node.args
    return w("Where", w[condition], *(w.operand(value, _dtype(node)) for value in values), dtype=_dtype(node))


@rule(aten.masked_fill.Scalar)
def _masked_fill(w: Writer, node: fx.Node) -> Any:
    x, mask, value = node.args
    return w("Where", w[mask], w.constant(value, _dtype(node)), w[x], dtype=_dtype(node))


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
    return w("Pow", *(w.operand(argument, _dtype(node)) for argument in node.args))


# --- reductions --------------------------------------------------------------------------------------------------


@rule(aten.sum.dim_IntList)
def _sum(w: Writer, node: fx.Node) -> Any:
    x, axes, keep = _arguments(node, self=None, dim=None, keepdim=False)
    return w("ReduceSum", w.cast(w[x], _dtype(node)), w.constant(list(axes)), keepdims=int(keep))


@rule(aten.amax.default)
def _amax(w: Writer, node: fx.Node) -> Any:
    x, axes, keep = _arguments(node, self=None, dim=(), keepdim=False)
    return w("ReduceMax", w[x], w.constant(list(axes)), keepdims=int(keep))


@rule(aten.max.default)
def _max(w: Writer, node: fx.Node) -> Any:
    return w("ReduceMax", w[node.args[0]], keepdims=0)


@rule(aten.softmax.int)
def _softmax(w: Writer, node: fx.Node) -> Any:
    x, axis = node.args[:2]
    return w("Softmax", w.cast(w[x], _dtype(node)), axis=axis)


@rule(aten.topk.default)
def _topk(w: Writer, node: fx.Node) -> Any:
    x, k, axis, largest, ordered = _arguments(node, self=None, k=None, dim=-1, largest=True, sorted=True)
    return w("TopK", w[x], w.constant([k]), axis=axis, largest=int(largest), sorted=int(ordered), outputs=2)


@rule(aten.layer_norm.default)
def _layer_norm(w: Writer, node: fx.Node) -> Any:
    x, shape, weight, bias, epsilon = _arguments(
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
    x, axis, start, end, step = _arguments(node, self=None, dim=0, start=None, end=None, step=1)
    bounds = [w.size(0 if start is None else start), w.size(2**63 - 1 if end is None else end)]
    return w("Slice", w[x], *bounds, w.constant([axis]), w.constant([step]))


@rule(aten.cat.default)
def _cat(w: Writer, node: fx.Node) -> Any:
    parts, axis = _arguments(node, tensors=None, dim=0)
    return w("Concat", *(w.operand(part, _dtype(node)) for part in parts), axis=axis)


@rule(aten.chunk.default, aten.split.Tensor, aten.split_with_sizes.default)
def _split(w: Writer, node: fx.Node) -> Any:
    x, _, axis = _arguments(node, self=None, sizes=None, dim=0)
    parts = [int(part.shape[axis]) for part in value_of(node)]
    return w("Split", w[x], w.constant(parts), axis=axis, outputs=len(parts))


@rule(aten.full.default)
def _full(w: Writer, node: fx.Node) -> Any:
    sizes, value = node.args
    filled = w.operand(value, _dtype(node))
    return w("Expand", filled, w.sizes(sizes)) if sizes else filled


@rule(aten.arange.default)
def _arange(w: Writer, node: fx.Node) -> Any:
    (end,) = node.args
    if isinstance(end, float) or _dtype(node) != torch.int64:
        return NotImplemented
    return _counted(w, w.size(end))


@rule(aten.pad.default)
def _pad(w: Writer, node: fx.Node) -> Any:
    x, sizes, mode, value = _arguments(node, self=None, pad=None, mode="constant", value=None)
    if mode != "constant" or not all(isinstance(size, int) for size in sizes):
        return NotImplemented
    axes = [-1 - i for i in range(len(sizes) // 2)]
    return w(
        "Pad", w[x], w.constant([*sizes[::2], *sizes[1::2]]), w.constant(value or 0.0, _dtype(node)), w.constant(axes)
    )


@rule(aten.full_like.default, aten.zeros_like.default)
def _full_like(w: Writer, node: fx.Node) -> Any:
    x, value = _arguments(node, self=None, fill_value=0)
    return w("Expand", w.constant(value, _dtype(node)), w.sizes_of(w[x]))


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
    source = w("Expand", w.constant(value, _dtype(node)), w.sizes_of(w[index]))
    return w("ScatterElements", w[x], w[index], source, axis=axis)


@rule(aten.select.int)
def _select(w: Writer, node: fx.Node) -> Any:
    x, axis, index = node.args
    return w("Gather", w[x], w.constant(index), axis=axis)


# --- positions, boundary tokens and tails ------------------------------------------------------------------------


def _valid(w: Writer, mask: fx.Node) -> ir.Value:
    """How many tokens of each row count, [B]."""
    return w.kept(
        ("valid", mask),
        lambda: w("ReduceSum", w.cast(w[mask], torch.int64), w.constant([1]), keepdims=0),
    )


def _last_valid(w: Writer, mask: fx.Node) -> ir.Value:
    """Position of each row's last token, [B]."""
    return w.kept(("last valid", mask), lambda: w("Sub", _valid(w, mask), w.constant(1)))


def _past(w: Writer, mask: fx.Node, tokens: fx.Node) -> ir.Value:
    """Tokens before the new ones where no row is padded, [1]."""
    return w.kept(("past", mask, tokens), lambda: w("Sub", w.dimension(mask, 1), w.dimension(tokens, 1)))


def _past_length(w: Writer, mask: fx.Node, tokens: fx.Node) -> ir.Value:
    """Of each row, [B]."""
    return w.kept(("past length", mask, tokens), lambda: w("Min", _last_valid(w, mask), _past(w, mask, tokens)))


def _tail_tokens(w: Writer, tokens: fx.Node, window: int) -> ir.Value:
    """min(window, S), [1]."""
    return w.kept(("tail", tokens, window), lambda: w("Min", w.dimension(tokens, 1), w.constant([window])))


def _counted(w: Writer, count: ir.Value) -> ir.Value:
    """0, 1, ... before `count` [1]."""
    return w.kept(("range", count), lambda: w("Range", w.constant(0), w("Squeeze", count), w.constant(1)))


@rule(ops.token_positions)
def _token_positions(w: Writer, node: fx.Node) -> Any:
    mask, tokens = node.args
    past, new = _past_length(w, mask, tokens), _counted(w, w.dimension(tokens, 1))
    return w("Add", w("Unsqueeze", past, w.constant([1])), w("Unsqueeze", new, w.constant([0])))


@rule(ops.rope_positions)
def _rope_positions(w: Writer, node: fx.Node) -> Any:
    return w("Transpose", w[node.args[0]], perm=[1, 2, 0])


@rule(ops.rotary_rows)
def _rotary_rows(w: Writer, node: fx.Node) -> Any:
    positions, axes = node.args
    rows = w("Gather", w[positions], w.constant(list(axes)), axis=2)
    return w("Reshape", rows, w.constant([-1, len(axes)]))


@rule(ops.token_rows)
def _token_rows(w: Writer, node: fx.Node) -> Any:
    """By two ranges that go no further than rows and tokens do, as a package's check asks of all."""
    batch, count = (w.dimension(node.args[0], axis) for axis in range(2))
    before = w("Mul", w("Unsqueeze", _counted(w, batch), w.constant([1])), count)
    return w("Add", before, w("Unsqueeze", _counted(w, count), w.constant([0])))


@rule(ops.last_position)
def _last_position(w: Writer, node: fx.Node) -> Any:
    mask, tokens = node.args
    return w("Add", _past_length(w, mask, tokens), w("Sub", w.dimension(tokens, 1), w.constant(1)))


@rule(ops.boundary_position)
def _boundary_position(w: Writer, node: fx.Node) -> Any:
    return _last_valid(w, node.args[0])


def _index(w: Writer, mask: fx.Node, tokens: fx.Node) -> ir.Value:
    """Of each row's boundary token among the new ones, [B]."""
    return w.kept(
        ("boundary", mask, tokens),
        lambda: w("Max", w("Sub", _last_valid(w, mask), _past(w, mask, tokens)), w.constant(0)),
    )


@rule(ops.boundary_index)
def _boundary_index(w: Writer, node: fx.Node) -> Any:
    return _index(w, *node.args)


def _start(w: Writer, mask: fx.Node, tokens: fx.Node, window: int) -> ir.Value:
    """Of each row's tail among the new tokens, [B]."""

    def written() -> ir.Value:
        before = w("Sub", _tail_tokens(w, tokens, window), w.constant(1))
        start: ir.Value = w("Max", w("Sub", _index(w, mask, tokens), before), w.constant(0))
        return start

    return w.kept(("start", mask, tokens, window), written)


@rule(ops.tail_start)
def _tail_start(w: Writer, node: fx.Node) -> Any:
    return _start(w, *node.args)


@rule(ops.tail_end)
def _tail_end(w: Writer, node: fx.Node) -> Any:
    mask, tokens, window = node.args
    behind = w("Sub", _tail_tokens(w, tokens, window), w.constant(1))
    return w("Add", w("Add", _past_length(w, mask, tokens), _start(w, mask, tokens, window)), behind)


def _rows(w: Writer, start: ir.Value, count: ir.Value | None, x: fx.Node) -> ir.Value:
    """start, start + 1, ... for every feature of x: [B, count, ...]. count None: 1."""
    rank, features = len(shape_of(x)), list(shape_of(x)[2:])
    indices = w("Unsqueeze", start, w.constant([1]))
    if count is not None:
        indices = w("Add", indices, w("Unsqueeze", _counted(w, count), w.constant([0])))
    if rank == 2:
        return indices
    indices = w("Unsqueeze", indices, w.constant(list(range(2, rank))))
    return w("Expand", indices, w.constant([1, 1, *features]))


@rule(ops.select_boundary)
def _select_boundary(w: Writer, node: fx.Node) -> Any:
    x, index = node.args
    rows = w.kept(("row", index, shape_of(x)[2:]), lambda: _rows(w, w[index], None, x))
    return w("GatherElements", w[x], rows, axis=1)


@rule(ops.select_tail)
def _select_tail(w: Writer, node: fx.Node) -> Any:
    x, start, window = node.args
    return w("GatherElements", w[x], _tail_rows(w, x, start, window), axis=1)


@rule(ops.insert_tail)
def _insert_tail(w: Writer, node: fx.Node) -> Any:
    x, tail, start = node.args
    assert start.target == ops.tail_start
    return w("ScatterElements", w[x], _tail_rows(w, x, start, start.args[2]), w[tail], axis=1)


def _tail_rows(w: Writer, x: fx.Node, start: fx.Node, window: int) -> ir.Value:
    features = shape_of(x)[2:]
    return w.kept(("rows", start, window, features), lambda: _rows(w, w[start], _tail_tokens(w, x, window), x))


@rule(ops.insert_boundary)
def _insert_boundary(w: Writer, node: fx.Node) -> Any:
    x, boundary, index = node.args
    places = w("Unsqueeze", _counted(w, w.dimension(x, 1)), w.constant([0]))
    found = w("Equal", places, w("Unsqueeze", w[index], w.constant([1])), dtype=torch.bool)
    for axis in range(2, len(shape_of(x))):
        found = w("Unsqueeze", found, w.constant([axis]))
    return w("Where", found, w[boundary], w[x], dtype=_dtype(node))


@rule(ops.replace_sink)
def _replace_sink(w: Writer, node: fx.Node) -> Any:
    x, sink, positions = node.args
    first = w.kept(
        ("first", positions),
        lambda: w("Unsqueeze", w("Equal", w[positions], w.constant(0), dtype=torch.bool), w.constant([-1])),
    )
    return w("Where", first, w[sink], w[x], dtype=_dtype(node))


# --- images ------------------------------------------------------------------------------------------------------


def _columns(w: Writer, x: ir.Value, start: int, end: int) -> ir.Value:
    """x[:, start:end]."""
    part: ir.Value = w("Slice", x, w.constant([start]), w.constant([end]), w.constant([1]))
    part.shape = None
    return part


@rule(ops.image_ends)
def _image_ends(w: Writer, node: fx.Node) -> Any:
    """Images in their order: those before a token are counted, and the last token of each is looked up."""
    is_image, positions = (w[argument] for argument in node.args[:2])
    limit = w("Unsqueeze", _valid(w, node.args[2]), w.constant([1]))
    image = w("And", is_image, w("Less", positions, limit, dtype=torch.bool))
    none = w("Expand", w.constant(False, torch.bool), w("Concat", w.dimension(node, 0), w.constant([1]), axis=0))
    before = w("Concat", none, _columns(w, image, 0, -1), axis=1)
    behind = w("Concat", _columns(w, image, 1, 2**62), none, axis=1)
    first, last = (w("And", image, w("Not", beside)) for beside in (before, behind))
    counted = w("CumSum", w("Reshape", w.cast(first, torch.int64), w.constant([-1])), w.constant(0))
    number = w("Sub", w("Reshape", counted, w.sizes_of(positions)), w.constant(1))
    ends = w("GatherND", positions, w("Transpose", w("NonZero", last, dtype=torch.int64), perm=[1, 0]))
    ends = w("Concat", ends, w.constant([0]), axis=0)  # for text before the first image, whose number is -1
    return w("Where", image, w("Gather", ends, number), positions, dtype=torch.int64)


@rule(aten.conv2d.padding)
def _conv2d(w: Writer, node: fx.Node) -> Any:
    x, weight, bias, stride, padding, dilation, groups = _arguments(
        node, input=None, weight=None, bias=None, stride=(1,), padding="valid", dilation=(1,), groups=1
    )
    if padding != "valid":
        return NotImplemented
    inputs = [w[x], w[weight], *([] if bias is None else [w[bias]])]
    return w("Conv", *inputs, strides=_pair(stride), dilations=_pair(dilation), group=groups)


@rule(aten.avg_pool2d.default)
def _avg_pool2d(w: Writer, node: fx.Node) -> Any:
    x, kernel, stride, padding, up, *_ = _arguments(
        node, self=None, kernel_size=None, stride=(), padding=(0,), ceil_mode=False, count_include_pad=True
    )
    if len(node.args) > 5 or node.kwargs or any(padding) or up:
        return NotImplemented
    return w("AveragePool", w[x], kernel_shape=_pair(kernel), strides=_pair(stride or kernel))


def _pair(sizes: list[int]) -> list[int]:
    """A size along height and width, which may be given once for both."""
    return [*sizes, *sizes][:2]


def _side_by_side(w: Writer, x: fx.Node, length: ir.Value) -> ir.Value:
    """x [N, H, D] as [N / length, length, H x D]; length [1]."""
    _, heads, size = shape_of(x)
    shape = w.kept(
        ("frames", length, heads * size),
        lambda: w("Concat", w.constant([-1]), length, w.constant([heads * size]), axis=0),
    )
    return w("Reshape", w[x], shape)


@rule(ops.rotate_tokens)
def _rotate_tokens(w: Writer, node: fx.Node) -> Any:
    x, cos, sin = node.args
    _, heads, size = shape_of(x)
    tokens = w.dimension(x, 0)
    positions = w.kept(("positions", tokens), lambda: w("Unsqueeze", _counted(w, tokens), w.constant([0])))
    tables = (w.cast(w[table], _dtype(x)) for table in (cos, sin))
    row = w("Reshape", w[x], w.constant([1, -1, heads * size]))
    rotated = w("RotaryEmbedding", row, positions, *tables, domain=CONTRIB, num_heads=heads)
    return w("Reshape", rotated, w.constant([-1, heads, size]))


@rule(ops.packed_attention)
def _packed_attention(w: Writer, node: fx.Node) -> Any:
    query, key, value, length, scale = node.args
    _, heads, size = shape_of(query)
    tokens = w.kept(("length", length), lambda: w("Reshape", w[length], w.constant([1])))
    frames = (_side_by_side(w, x, tokens) for x in (query, key, value))
    attended = w("MultiHeadAttention", *frames, domain=CONTRIB, num_heads=heads, scale=scale)
    return w("Reshape", attended, w.constant([-1, heads, size]))


@rule(ops.scatter_features)
def _scatter_features(w: Writer, node: fx.Node) -> Any:
    x, places, features = node.args
    found = w("Transpose", w("NonZero", w[places], dtype=torch.int64), perm=[1, 0])
    count = w("Shape", found, start=0, end=1)
    given = w("Min", w.dimension(features, 0), w.constant([1]))
    taken = w("Slice", found, w.constant([0]), w("Mul", count, given), w.constant([0]))
    return w("ScatterND", w[x], taken, w[features])
