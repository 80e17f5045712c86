"""Multiply in int8: weights with a scale for every output feature, activations with one for every token.

    linear(x, W)  =>  s = max(|x|) / 127
                      MatMulIntegerToFloat(QuantizeLinear(x / s), int8_weight(W), feature_scales(W)) * s

The field's name for it is W8A8. A prompt's products are bound by arithmetic, and integer instructions do two to four
times as many as those of fp32, or those of weights in blocks (quantize_linear.py), which are made for single tokens.
Scales of tokens are taken at run time: a token with outliers costs the others nothing, and what is computed for one
does not depend on its neighbours, as it would with DynamicQuantizeMatMul, which has one scale for all.

Left to QuantizeLinear is what makes queries, keys and values, where rounding activations costs most, and the LM head,
which multiplies one row and may share its weight with the embedding. Routers are left to LowerLinear.
Spec: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftmatmulintegertofloat
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, fx
from torch.fx.passes.infra.pass_base import PassResult

from . import ops
from .base import Pass
from .graph import emit, emit_sizes, find, replace, role_of, shape_of, value_of
from .onnx_ops import CONTRIB, emit_onnx

aten = torch.ops.aten

#: the largest value of a symmetric int8
_LARGEST = 127
#: what stands for zero: x86 has integer instructions for unsigned activations
_ZERO_POINT = 128


@ops.operator("int8_weight(Tensor weight) -> Tensor", lambda weight: weight.T.new_empty(weight.T.shape).to(torch.int8))
def int8_weight(weight: Tensor) -> Tensor:
    """MatMulIntegerToFloat's B of a linear layer's weight [out, in]: [in, out] int8."""
    return (weight.float() / feature_scales(weight)[:, None]).round().to(torch.int8).T.contiguous()


@ops.operator("feature_scales(Tensor weight) -> Tensor", lambda weight: weight.new_empty(weight.shape[:1]))
def feature_scales(weight: Tensor) -> Tensor:
    """One scale for every output feature of a linear layer's weight [out, in]: [out] fp32."""
    return weight.float().abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / _LARGEST


#: roles of linear layers that QuantizeLinear and LowerLinear take
_LEFT = {"q_proj", "k_proj", "v_proj", "qkv_proj", "calibrated", "router", "lm_head"}


def dynamic_linears(gm: fx.GraphModule) -> list[fx.Node]:
    """Linear layers that multiply in int8."""
    roles = {node: role_of(node) or "" for node in find(gm, op=aten.linear.default)}
    return [node for node, role in roles.items() if role.rpartition("/")[2] not in _LEFT]


class Tokens(NamedTuple):
    """Activations as integers: values [.., features] uint8 around zero_point, and their scales [.., 1]."""

    values: fx.Node
    scales: fx.Node
    one: fx.Node
    zero_point: fx.Node


class QuantizeDynamic(Pass):
    stages = ("prefill", "decode")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        graph = graph_module.graph
        tokens: dict[fx.Node, Tokens] = {}  # what several linear layers read is quantized once
        for node in dynamic_linears(graph_module):
            x = node.args[0]
            with graph.inserting_before(node):
                if x not in tokens:
                    tokens[x] = self._quantize(graph, x, node)
                replace(node, self._linear(graph, node, tokens[x]))
            self.matches += 1
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        self.check(not dynamic_linears(graph_module), "a linear of a layer is left")

    @staticmethod
    def _quantize(graph: fx.Graph, x: fx.Node, like: fx.Node) -> Tokens:
        """A row of zeros has the scale zero, and so comes out as zeros, whatever 0 / 0 becomes as an integer."""
        largest = emit(graph, aten.amax.default, emit(graph, aten.abs.default, x, like=like), [-1], True, like=like)
        scales = emit(graph, aten.mul.Tensor, largest, 1 / _LARGEST, like=like)
        even = emit(graph, aten.div.Tensor, x, scales, like=like)
        one = emit(graph, aten.full.default, [], 1.0, dtype=torch.float32, like=like)
        zero_point = emit(graph, aten.full.default, [], _ZERO_POINT, dtype=torch.uint8, like=like)
        inputs, sizes = [even, one, zero_point], emit_sizes(graph, x)
        values = emit_onnx(graph, "QuantizeLinear", inputs, {}, shape=sizes, dtype=torch.uint8, like=like)
        return Tokens(values, scales, one, zero_point)

    @staticmethod
    def _linear(graph: fx.Graph, node: fx.Node, tokens: Tokens) -> fx.Node:
        x, weight, *bias = node.args
        name = weight.meta.get("parameter", str(weight.target))
        matrix = emit(graph, int8_weight, weight, like=node)
        scales = emit(graph, feature_scales, weight, like=node)
        matrix.meta["parameter"], scales.meta["parameter"] = f"{name}_int8", f"{name}_scales"
        product = emit_onnx(
            graph,
            f"{CONTRIB}::MatMulIntegerToFloat",
            [tokens.values, matrix, tokens.one, scales, tokens.zero_point],
            {},
            shape=[*emit_sizes(graph, x)[:-1], shape_of(weight)[0]],
            dtype=value_of(node).dtype,
            like=node,
        )
        out = emit(graph, aten.mul.Tensor, product, tokens.scales, like=node)
        for term in bias:
            out = emit(graph, aten.add.Tensor, out, term, like=node)
        return out
