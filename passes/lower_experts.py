"""Lower experts to ONNX Runtime's MoE, or to QMoE where their weights are quantized.

    experts(x, gate_up, down, index, weights, biases..., alpha, shift, limit)
        => MoE(x, log(dense weights), gate and up row by row, down, their biases) * sum(weights)

The operators choose the experts themselves, the k largest of a softmax. For them to choose the graph's, whatever its
routing, they get the logarithms of its weights, and next to minus infinity for every other expert. The softmax of that
is the weights over their sum.
Spec: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#com.microsoft.MoE
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from . import ops
from .base import Pass
from .graph import emit, emit_sizes, find, replace, shape_of, value_of
from .onnx_ops import CONTRIB, emit_onnx
from .quantize_linear import Quantization, emit_quantized

aten = torch.ops.aten

#: the logarithm of no weight, within the range of fp16
_NOT_CHOSEN = -1e4


@dataclass(frozen=True)
class ExpertKernels:
    """What an execution provider's kernels of MoE and QMoE need.

    fp32_only: whether MoE computes in fp32 alone. quantized: whether QMoE takes blocks as ONNX Runtime's quantizer
    makes them. overwrites_input: whether MoE zeroes the memory of its output before it has read its input, which ONNX
    Runtime puts there where nothing reads the input later.
    """

    fp32_only: bool = False
    quantized: bool = False
    overwrites_input: bool = False


class LowerExperts(Pass):
    stages = ("prefill", "decode")

    def __init__(self, kernels: ExpertKernels, quantization: Quantization | None = None) -> None:
        super().__init__()
        self.kernels = kernels
        self.quantization = quantization if kernels.quantized else None

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for node in find(graph_module, op=ops.experts):
            with graph_module.graph.inserting_before(node):
                replace(node, self._lowered(graph_module.graph, node))
            self.matches += 1
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        self.check(not find(graph_module, op=ops.experts), "experts are left")

    def _lowered(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        x, gate_up, down, index, weights, *rest = node.args
        biases, (alpha, shift, limit) = (rest or [None, None])[:2], rest[2:] or (1.0, 0.0, 0.0)
        assert isinstance(gate_up, fx.Node) and isinstance(down, fx.Node) and isinstance(index, fx.Node)
        count, rows, hidden = shape_of(gate_up)
        quantization = self._quantization(hidden, rows // 2)
        widen = self.kernels.fp32_only and not quantization
        dtype = torch.float32 if widen else value_of(x).dtype
        first = _row_by_row(graph, gate_up, node)
        biases = [biases[0] and _row_by_row(graph, biases[0], node), biases[1]]
        attributes = {
            "k": shape_of(index)[1],
            "activation_type": "swiglu",
            "activation_alpha": alpha,
            "activation_beta": shift,
            "swiglu_fusion": 1,  # gate and up row by row: all that the CPU's kernel takes
        } | ({"swiglu_limit": limit} if limit else {})
        if quantization:
            operator, matrices = "QMoE", []
            for matrix, bias in zip((first, down), biases, strict=True):
                matrices += [*_quantized(graph, matrix, quantization, node), bias]
            attributes |= {"expert_weight_bits": quantization.bits, "block_size": quantization.block_size}
        else:
            operator = "MoE"
            matrices = [_cast(graph, value, dtype, node) for value in (first, biases[0], down, biases[1])]
            matrices = matrices if biases[1] else matrices[:-1]
        x = _cast(graph, x, dtype, node)
        routing = _cast(graph, _routing(graph, index, weights, count, node), dtype, node)
        inputs, sizes = [x, routing, *matrices], emit_sizes(graph, x)
        out = emit_onnx(graph, f"{CONTRIB}::{operator}", inputs, attributes, shape=sizes, dtype=dtype, like=node)
        if self.kernels.overwrites_input and not quantization:
            out = _after_last_use(graph, x, out, node)
        total = emit(graph, aten.sum.dim_IntList, weights, [-1], True, like=node)
        out = emit(graph, aten.mul.Tensor, out, _cast(graph, total, dtype, node), like=node)
        return _cast(graph, out, value_of(node).dtype, node)

    def _quantization(self, *inputs: int) -> Quantization | None:
        """How the experts' matrices with so many input features are quantized: QMoE takes whole blocks alone."""
        whole = self.quantization and not any(size % self.quantization.block_size for size in inputs)
        return self.quantization if whole else None


def _cast(graph: fx.Graph, value: Any, dtype: torch.dtype, like: fx.Node) -> Any:
    """A value, None too, in that type."""
    known = value is None or value_of(value).dtype == dtype
    return value if known else emit(graph, aten.to.dtype, value, dtype, like=like)


def _routing(graph: fx.Graph, index: fx.Node, weights: Any, experts: int, like: fx.Node) -> fx.Node:
    """[N, experts], fp32, whose softmax is the weights [N, k] of the experts index [N, k] over their sum."""
    column = emit(graph, aten.slice.Tensor, index, 1, 0, 1, like=like)
    nowhere = emit(graph, aten.full_like.default, column, _NOT_CHOSEN, dtype=torch.float32, like=like)
    nowhere = emit(graph, aten.expand.default, nowhere, [-1, experts], like=like)
    chosen = emit(graph, aten.log.default, _cast(graph, weights, torch.float32, like), like=like)
    return emit(graph, aten.scatter.src, nowhere, 1, index, chosen, like=like)


def _after_last_use(graph: fx.Graph, x: fx.Node, out: fx.Node, like: fx.Node) -> fx.Node:
    """`out`, [N, hidden], in a way that reads x [N, hidden] once more, so that `out` may not take its memory."""
    always = emit(graph, aten.full.default, [1], True, dtype=torch.bool, like=like)
    return emit(graph, aten.where.self, always, out, x, like=like)


def _row_by_row(graph: fx.Graph, gate_up: fx.Node, like: fx.Node) -> fx.Node:
    """[E, 2 I, ...] with gate above up as [E, 2 I, ...] with a row of gate, the one of up, and so on."""
    experts, rows, *features = shape_of(gate_up)
    pairs = emit(graph, aten.view.default, gate_up, [experts, 2, rows // 2, *features], like=like)
    pairs = emit(graph, aten.transpose.int, pairs, 1, 2, like=like)
    first = emit(graph, aten.reshape.default, pairs, [experts, rows, *features], like=like)
    first.meta["parameter"] = _parameter(gate_up)
    return first


def _parameter(node: fx.Node) -> str:
    """The name of the (first) parameter that an expression is made of."""
    while node.op != "get_attr":
        node = node.all_input_nodes[0]
    return str(node.target)


def _quantized(graph: fx.Graph, matrix: fx.Node, scheme: Quantization, like: fx.Node) -> list[fx.Node]:
    """Values [E, out, bytes] and scales [E, out, blocks] of matrices [E, out, in]."""
    experts, outputs, inputs = shape_of(matrix)
    name = matrix.meta.get("parameter") or _parameter(matrix)
    flat = emit(graph, aten.reshape.default, matrix, [experts * outputs, inputs], like=like)
    flat.meta["parameter"] = name
    parts = emit_quantized(graph, flat, scheme, like)
    folded = [emit(graph, aten.reshape.default, part, [experts, outputs, -1], like=like) for part in parts]
    for part, whole in zip(parts, folded, strict=True):
        whole.meta["parameter"] = part.meta["parameter"]
    return folded
