"""Matrix products of fp16 weights in fp32, for a provider whose MatMul has no fp16 kernel.

ONNX Runtime widens such products itself, but a weight that stands outside of a branch at every run. Said here, the
conversion of a weight stands beside it, where ONNX Runtime folds it when a session is opened:

    y = MatMul(x, weight)
    =>  wide = Cast(weight)                          once, in the graph that holds the weight
        y = Cast(MatMul(Cast(x), wide))              in whichever branch
"""

from __future__ import annotations

import onnx_ir as ir

_PRODUCTS = ("MatMul", "FusedMatMul")


def widen_products(model: ir.Model) -> None:
    """Rewrite the products of a model's fp16 parameters, in place."""
    graph = model.graph
    for weight in list(graph.initializers.values()):
        products = [node for node, index in weight.uses() if index == 1 and node.op_type in _PRODUCTS]
        if weight.dtype != ir.DataType.FLOAT16 or not products:
            continue
        wide = _cast(weight, ir.DataType.FLOAT, f"{weight.name}/Cast")
        graph.insert_before(graph[0], wide)
        for node in products:
            _widen(node, wide.outputs[0])


def _widen(product: ir.Node, weight: ir.Value) -> None:
    out, x, graph = product.outputs[0], product.inputs[0], product.graph
    assert graph is not None and x is not None
    before = _cast(x, ir.DataType.FLOAT, f"{product.name}/Cast")
    after = _cast(out, ir.DataType.FLOAT16, f"{product.name}/Cast_1")
    ir.convenience.replace_all_uses_with(out, after.outputs[0], replace_graph_outputs=True)
    after.replace_input_with(0, out)
    after.outputs[0].name, out.name = out.name, f"{product.name}/MatMul_output"
    out.type = ir.TensorType(ir.DataType.FLOAT)
    product.replace_input_with(0, before.outputs[0])
    product.replace_input_with(1, weight)
    graph.insert_before(product, before)
    graph.insert_after(product, after)


def _cast(value: ir.Value, to: ir.DataType, name: str) -> ir.Node:
    node = ir.node("Cast", [value], {"to": int(to)}, name=name)
    out = node.outputs[0]
    out.name, out.type, out.shape = f"{name}_output", ir.TensorType(to), value.shape
    return node
