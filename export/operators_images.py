"""How the operators of a vision tower, PyTorch's and ours (passes/ops.py), are written in ONNX."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from popcompile.passes import ops
from popcompile.passes.graph import shape_of
from popcompile.passes.onnx_ops import CONTRIB

from .rules import Rules, arguments, counted, dtype_of
from .writer import Writer

aten = torch.ops.aten
RULES = Rules()
rule = RULES.of


@rule(aten.conv2d.padding)
def _conv2d(w: Writer, node: fx.Node) -> Any:
    x, weight, bias, stride, padding, dilation, groups = arguments(
        node, input=None, weight=None, bias=None, stride=(1,), padding="valid", dilation=(1,), groups=1
    )
    if padding != "valid":
        return NotImplemented
    inputs = [w[x], w[weight], *([] if bias is None else [w[bias]])]
    return w("Conv", *inputs, strides=_pair(stride), dilations=_pair(dilation), group=groups)


@rule(aten.avg_pool2d.default)
def _avg_pool2d(w: Writer, node: fx.Node) -> Any:
    x, kernel, stride, padding, up, *_ = arguments(
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
    positions = w.kept(("positions", tokens), lambda: w("Unsqueeze", counted(w, tokens), w.constant([0])))
    tables = (w.cast(w[table], dtype_of(x)) for table in (cos, sin))
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
