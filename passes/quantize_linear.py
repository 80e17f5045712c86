"""Quantize the weights of linear layers, block by block of input features.

    linear(x, W)  =>  MatMulNBits(x, quantized_weight(W), weight_scales(W))
    embedding(W, ids)  =>  GatherBlockQuantized(quantized_weight(W), ids, weight_scales(W))

Symmetric, a scale for every block of a row: ONNX Runtime's own quantizer computes both when weights are written. The
embedding is quantized where the LM head has the same weight, which is then stored once. Routers are left to
LowerLinear: they are small, and rounded ones choose other experts.
Spec: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftmatmulnbits and
#commicrosoftgatherblockquantized
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

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
    from onnxruntime.quantization.matmul_nbits_quantizer import (
        DefaultWeightOnlyQuantConfig,
        DefaultWeightOnlyQuantizer,
    )

    config = DefaultWeightOnlyQuantConfig(block_size=block_size, is_symmetric=True, bits=bits)
    quantizer = DefaultWeightOnlyQuantizer(config)
    values, scales, _ = quantizer.qbits_block_quant(weight.float().T.contiguous().numpy())
    return torch.from_numpy(values), torch.from_numpy(scales)


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
        linears = self._quantizable(graph_module)
        weights = {node.args[1] for node in linears}
        for node in linears:
            with graph_module.graph.inserting_before(node):
                replace(node, self._linear(graph_module.graph, node))
            self.matches += 1
        for node in find(graph_module, op=aten.embedding.default):
            weight = node.args[0]
            if weight in weights and shape_of(weight)[1] % self.quantization.block_size == 0:
                with graph_module.graph.inserting_before(node):
                    replace(node, self._embedding(graph_module.graph, node))
                self.matches += 1
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        self.check(not self._quantizable(graph_module), "a linear is left")

    @staticmethod
    def _quantizable(gm: fx.GraphModule) -> list[fx.Node]:
        return [n for n in find(gm, op=aten.linear.default) if not (role_of(n) or "").endswith("router")]

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

    def _embedding(self, graph: fx.Graph, node: fx.Node) -> fx.Node:
        """Rows of the weight as MatMulNBits keeps them: [.., blocks, block size], and then side by side."""
        weight, ids = node.args[:2]
        assert isinstance(weight, fx.Node) and isinstance(ids, fx.Node)
        scheme = self.quantization
        values, scales = emit_quantized(graph, weight, scheme, node)
        column = emit(graph, aten.unsqueeze.default, scales, 2, like=node)  # the operator asks for the values' rank
        column.meta["parameter"] = f"{scales.meta['parameter']}_of_rows"
        sizes, width = emit_sizes(graph, ids), shape_of(weight)[1]
        blocks = emit_onnx(
            graph,
            f"{CONTRIB}::GatherBlockQuantized",
            [values, ids, column],
            {"bits": scheme.bits, "block_size": scheme.block_size, "gather_axis": 0, "quantize_axis": 2},
            shape=[*sizes, width // scheme.block_size, scheme.block_size],
            dtype=value_of(node).dtype,
            like=node,
        )
        return emit(graph, aten.reshape.default, blocks, [*sizes, width], like=node)
