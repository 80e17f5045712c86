"""Quantize an embedding whose table is a linear layer's weight as well: that of an LM head which is tied to it.

    embedding(W, ids)  =>  GatherBlockQuantized(quantized_weight(W), ids, weight_scales(W))

The table is then stored once, in the blocks that QuantizeLinear makes of it, which is to run after this. The linear
layer may be in another graph of the program: a vision-language model embeds tokens outside of its decoder.
Spec: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftgatherblockquantized
"""

from __future__ import annotations

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from .base import Pass
from .graph import emit, emit_sizes, find, replace, shape_of, value_of
from .onnx_ops import CONTRIB, emit_onnx
from .quantize_linear import Quantization, emit_quantized, quantizable_linears

aten = torch.ops.aten


class QuantizeEmbedding(Pass):
    stages = ("prefill", "decode")

    def __init__(self, quantization: Quantization) -> None:
        super().__init__()
        self.quantization = quantization

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for node in self._quantizable(graph_module):
            with graph_module.graph.inserting_before(node):
                replace(node, self._embedding(graph_module.graph, node))
            self.matches += 1
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        self.check(not self._quantizable(graph_module), "an embedding of a weight that is quantized is left")

    def _quantizable(self, gm: fx.GraphModule) -> list[fx.Node]:
        """Embeddings in the rows of a linear layer's weight, which blocks divide."""
        weights = {
            weight.target
            for graph in self.program.graphs.values()
            for linear in quantizable_linears(graph)
            if isinstance(weight := linear.args[1], fx.Node) and weight.op == "get_attr"
        }
        return [
            node
            for node in find(gm, op=aten.embedding.default)
            if isinstance(table := node.args[0], fx.Node)
            and table.target in weights
            and shape_of(table)[1] % self.quantization.block_size == 0
        ]

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
