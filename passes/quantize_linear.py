"""Quantize the weights of linear layers, block by block of input features.

    linear(x, W)  =>  MatMulNBits(x, quantized_weight(W), weight_scales(W))

Symmetric, a scale for every block of a row: ONNX Runtime's own quantizer computes both when weights are written.
Routers are left to LowerLinear: they are small, and rounded ones choose other experts.
Spec: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftmatmulnbits
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from popcompile.quiet import logging_kept

from . import ops
from .base import Pass
from .graph import emit, emit_sizes, find, replace, role_of, shape_of, value_of
from .onnx_ops import CONTRIB, emit_onnx

aten = torch.ops.aten

#: rows of a weight that are quantized at a time, which bounds memory
_ROWS = 4096


@dataclass(frozen=True)
class Quantization:
    """bits: 4 or 8. block_size: input features that share a scale, a power of two from 16.

    accuracy_level: the operator's attribute; 4 lets it multiply in int8, 0 takes the activations' own type.
    dynamic: most linear layers multiply in int8, with a scale for every token (quantize_dynamic.py).
    """

    bits: int
    block_size: int = 32
    accuracy_level: int = 0
    dynamic: bool = False


def _weight_shape(weight: Tensor, bits: int, block_size: int) -> Tensor:
    blocks = -(-weight.shape[1] // block_size)
    return weight.new_empty((weight.shape[0], blocks, block_size * bits // 8), dtype=torch.uint8)


@ops.operator("quantized_weight(Tensor weight, int bits, int block_size) -> Tensor", _weight_shape)
def quantized_weight(weight: Tensor, bits: int, block_size: int) -> Tensor:
    """MatMulNBits' B of a linear layer's weight [out, in]: [out, blocks, bytes of a block] uint8."""
    return torch.cat([_quantize(rows, bits, block_size)[0] for rows in weight.split(_ROWS)])


def _scales_shape(weight: Tensor, bits: int, block_size: int) -> Tensor:
    # in the activations' dtype, which fp32 scales are cast to when they are written
    return weight.new_empty((weight.shape[0], -(-weight.shape[1] // block_size)))


@ops.operator("weight_scales(Tensor weight, int bits, int block_size) -> Tensor", _scales_shape)
def weight_scales(weight: Tensor, bits: int, block_size: int) -> Tensor:
    """MatMulNBits' scales of a linear layer's weight [out, in]: [out, blocks] fp32."""
    return torch.cat([_quantize(rows, bits, block_size)[1] for rows in weight.split(_ROWS)])


def _quantize(weight: Tensor, bits: int, block_size: int) -> tuple[Tensor, Tensor]:
    with logging_kept():
        from onnxruntime.quantization.matmul_nbits_quantizer import (
            DefaultWeightOnlyQuantConfig,
            DefaultWeightOnlyQuantizer,
        )

    config = DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=True, bits=bits)
    quantizer = DefaultWeightOnlyQuantizer(config)
    values, scales, _ = quantizer.qbits_block_quant(weight.float().T.contiguous().numpy())
    return torch.from_numpy(values), torch.from_numpy(scales)


def quantizable_linears(gm: fx.GraphModule) -> list[fx.Node]:
    """Linear layers whose weights are quantized."""
    return [n for n in find(gm, op=aten.linear.default) if not (role_of(n) or "").endswith("router")]


def emit_quantized(graph: fx.Graph, weight: fx.Node, scheme: Quantization, like: fx.Node) -> tuple[fx.Node, fx.Node]:
    """quantized_weight and weight_scales of a weight [out, in], named after its parameter."""
    name = weight.meta.get("parameter", str(weight.target))
    values = emit(graph, quantized_weight, weight, scheme.bits, scheme.block_size, like=like)
    scales = emit(graph, weight_scales, weight, scheme.bits, scheme.block_size, like=like)
    values.meta["parameter"], scales.meta["parameter"] = f"{name}_int{scheme.bits}", f"{name}_scales"
    return values, scales


class QuantizeLinear(Pass):
    stages = ("prefill", "decode")

    def __init__(self, quantization: Quantization) -> None:
        super().__init__()
        self.quantization = quantization

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for node in quantizable_linears(graph_module):
            with graph_module.graph.inserting_before(node):
                replace(node, self._linear(graph_module.graph, node))
            self.matches += 1
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        self.check(not quantizable_linears(graph_module), "a linear is left")

    def _linear(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        x, weight, *bias = node.args
        assert isinstance(x, fx.Node) and isinstance(weight, fx.Node)
        values, scales = emit_quantized(graph, weight, self.quantization, node)
        outputs, inputs = shape_of(weight)
        scheme = self.quantization
        attributes = {
            "K": inputs,
            "N": outputs,
            "bits": scheme.bits,
            "block_size": scheme.block_size,
            "accuracy_level": scheme.accuracy_level,
        }
        out = emit_onnx(
            graph,
            f"{CONTRIB}::MatMulNBits",
            [x, values, scales],
            attributes,
            shape=[*emit_sizes(graph, x)[:-1], outputs],
            dtype=value_of(node).dtype,
            like=node,
        )
        for term in bias:
            out = emit(graph, aten.add.Tensor, out, term, like=node)
        return out
