"""FLOPs of a stage, from shapes.

Matrix products are counted by torch.utils.flop_counter's formulas (2 x multiply-adds); in a mixture of experts, those
of the experts that a token is given to. Attention is counted by its formula too, scaled to the (query, key) pairs that
the causal mask and the sliding window leave: a query at position p of a full layer reads p + 1 keys. Element-wise work
is not counted (below 1% in a decoder), and neither is what tokens of an image see of it behind them.

Of a vision tower, whose attention is counted whole, `total` is the number of patches of an image.

Reference sizes: prefill is one prompt of 1,024 tokens without a past, decode is one token after 1,024; an image has 256
tokens, where images have any size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils import flop_counter
from torch.utils.flop_counter import addmm_flop, bmm_flop, conv_flop_count, flop_registry, sdpa_flop_count

from . import ops
from .contract import ContractError
from .graph import call_nodes, dimension_symbols, evaluate_dim, find, layer_of, outputs_of, shape_of
from .onnx_ops import attributes_of, onnx_inputs, onnx_op_type

aten = torch.ops.aten

REFERENCE_SIZES: dict[str, dict[str, int]] = {
    "prefill": {"batch": 1, "sequence": 1024, "past": 0, "total": 1024},
    "decode": {"batch": 1, "sequence": 1, "past": 1024, "total": 1025},
    "model": {"batch": 1, "sequence": 1024, "past": 0, "total": 1024},
}


REFERENCE_IMAGE_TOKENS = 256

#: FLOPs of a product of two shapes. Layers repeat theirs, and PyTorch looks for tensors in them each time
mm_flop = lru_cache(maxsize=4096)(flop_counter.mm_flop)


def total_flops(gm: fx.GraphModule, stage: str) -> int:
    """FLOPs of one run of the graph at the stage's reference sizes."""
    return sum(flops_by_layer(gm, stage).values())


def flops_by_layer(gm: fx.GraphModule, stage: str, sizes: dict[str, int] | None = None) -> dict[int | None, int]:
    """FLOPs of every layer (None: embedding and head) at given sizes, by default the stage's reference sizes."""
    sizes = sizes or REFERENCE_SIZES[stage]
    values = {symbol: sizes[name] for name, symbol in dimension_symbols(gm).items()}
    counts: dict[int | None, int] = {}
    for node in call_nodes(gm):
        if flops := node_flops(node, values, sizes["total"]):
            counts[layer_of(node)] = counts.get(layer_of(node), 0) + flops
    return counts


def image_flops(vision: fx.GraphModule) -> tuple[int, int]:
    """Tokens of one image, REFERENCE_IMAGE_TOKENS where it may have any number, and its FLOPs in a vision graph."""
    sizes = {"num_images": 1, "num_image_tokens": REFERENCE_IMAGE_TOKENS}
    values = {symbol: sizes[name] for name, symbol in dimension_symbols(vision).items()}
    patches = find(vision, op=ops.packed_attention)[0].args[0]
    assert isinstance(patches, fx.Node)
    count, tokens = (evaluate_dim(shape_of(node)[0], values) for node in (patches, outputs_of(vision)[0]))
    return tokens, sum(flops_by_layer(vision, "vision", sizes | {"total": count}).values())


#: the shape of a node of the graph whose FLOPs are counted
_Shapes = Callable[[object], tuple[int, ...]]
#: FLOPs of one node, given shapes and the sequence length with the past
_Formula = Callable[[fx.Node, _Shapes, int], int]


def node_flops(node: fx.Node, sizes: dict[sympy.Symbol, int], total: int) -> int:
    """FLOPs of one node; `total` is the sequence length, past included.

    Raises ContractError for an operator that multiplies matrices, or one of ONNX, that has no formula here: it would
    make a model look faster than it is.
    """

    def shape(n: object) -> tuple[int, ...]:
        assert isinstance(n, fx.Node)
        return tuple(evaluate_dim(d, sizes) for d in shape_of(n))

    name = onnx_op_type(node)
    formula = _OF_ONNX.get(name) if name else _OF_TORCH.get(node.target)
    if formula is not None:
        return formula(node, shape, total)
    counted_by_torch = getattr(node.target, "overloadpacket", None) in flop_registry
    if counted_by_torch or (name is not None and name not in _NOT_COUNTED):
        raise ContractError(f"{name or node.target} has no formula for its FLOPs (passes/flops.py)")
    return 0


def _linear(node: fx.Node, shape: _Shapes, _: int) -> int:
    x, w = shape(node.args[0]), shape(node.args[1])
    return mm_flop((product(x[:-1]), x[-1]), (w[1], w[0]))


def _products(node: fx.Node, shape: _Shapes, _: int) -> int:
    """Of matrices, or batches of them, in any number of dimensions."""
    a, b = (shape(n) for n in node.all_input_nodes[:2])
    out = shape(node)
    return mm_flop((product(out[:-1]), a[-1]), (a[-1], out[-1])) if b else 0


def _blockwise(node: fx.Node, shape: _Shapes, _: int) -> int:
    x, attributes = shape(onnx_inputs(node)[0]), attributes_of(node)
    return mm_flop((product(x[:-1]), attributes["K"]), (attributes["K"], attributes["N"]))


def _experts(node: fx.Node, shape: _Shapes, _: int) -> int:
    (_, rows, hidden), (tokens, chosen) = shape(node.args[1]), shape(node.args[3])
    return experts_flops(tokens * chosen, hidden, rows // 2)


def _lowered_experts(node: fx.Node, shape: _Shapes, _: int) -> int:
    x, first = shape(onnx_inputs(node)[0]), shape(onnx_inputs(node)[2])
    return experts_flops(x[0] * attributes_of(node)["k"], x[1], first[1] // 2)


def _attention(node: fx.Node, shape: _Shapes, total: int) -> int:
    query, value = shape(node.args[0]), shape(node.args[2])
    return attention_flops(query, value[3], total, int(node.args[5]))


def _lowered_attention(node: fx.Node, shape: _Shapes, total: int) -> int:
    query, past = onnx_inputs(node)[0], onnx_inputs(node)[3]
    (batch, new, _), head_size = shape(query), shape(past)[3]
    attributes = attributes_of(node)
    heads, window = attributes["num_heads"], max(attributes.get("local_window_size", -1), 0)
    return attention_flops((batch, heads, new, head_size), head_size, total, window)


def _packed_attention(node: fx.Node, shape: _Shapes, total: int) -> int:
    tokens, heads, size = shape(node.args[0])
    frames = (tokens // total, heads, total, size)
    return sdpa_flop_count(frames, frames, frames)


_OF_TORCH: dict[Any, _Formula] = {
    aten.linear.default: _linear,
    aten.mm.default: lambda node, shape, _: mm_flop(*map(shape, node.args[:2])),
    aten.addmm.default: lambda node, shape, _: addmm_flop(*map(shape, node.args[:3])),
    aten.bmm.default: lambda node, shape, _: bmm_flop(*map(shape, node.args[:2])),
    aten.matmul.default: _products,
    ops.experts: _experts,
    ops.attention: _attention,
    ops.packed_attention: _packed_attention,
    aten.conv2d.padding: lambda node, shape, _: conv_flop_count(*map(shape, (*node.args[:2], node))),
}
_OF_ONNX: dict[str, _Formula] = {
    "MatMul": _products,
    "FusedMatMul": _products,
    "MatMulIntegerToFloat": _products,
    "MatMulNBits": _blockwise,
    "MoE": _lowered_experts,
    "QMoE": _lowered_experts,
    "GroupQueryAttention": _lowered_attention,
}
#: operators of ONNX that passes make and that are not counted: element by element, or of images alone
_NOT_COUNTED = {
    "SimplifiedLayerNormalization", "SkipSimplifiedLayerNormalization", "RotaryEmbedding", "QuantizeLinear",
    "GatherBlockQuantized", "ImageAttention",
}  # fmt: skip


def experts_flops(rows: int, hidden: int, inner: int) -> int:
    """FLOPs of SwiGLU blocks for so many rows, tokens x experts of a token: gate, up and down."""
    return mm_flop((rows, hidden), (hidden, 2 * inner)) + mm_flop((rows, inner), (inner, hidden))


@lru_cache(maxsize=4096)  # as many additions as there are queries, and the same in every layer
def attention_flops(query: tuple[int, ...], value_size: int, total: int, window: int) -> int:
    """FLOPs of causal attention: query [B, H, S, D], the last S of `total` positions, window 0 = unlimited."""
    batch, heads, new, size = query
    rectangle = sdpa_flop_count(query, (batch, heads, total, size), (batch, heads, total, value_size))
    seen = sum(min(p + 1, window or total) for p in range(total - new, total))
    return rectangle * seen // (new * total)


def product(values: Iterable[int]) -> int:
    result = 1
    for value in values:
        result *= value
    return result
