"""Products of integers that a CPU's kernels add up wrongly, made exact.

On x86 without VNNI instructions ONNX Runtime multiplies uint8 activations by int8 weights with VPMADDUBSW, which adds
two products in 16 bits and saturates. Its option against that, session.x64quantprecision, finds no weights that a
branch reads from the graph around it, as of 1.31. Products of uint8 and uint8 are exact there, and slower: a weight w
is held as w + 128, with 128 for zero. https://github.com/microsoft/onnxruntime/pull/12088
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import cache

import numpy as np
import onnxruntime as ort
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

_PRODUCT, _DOMAIN = "MatMulIntegerToFloat", "com.microsoft"
#: of its inputs
_WEIGHT, _WEIGHT_ZERO = 1, 5
_ZERO_POINT = "popcompile.zero_point_of_uint8"


@cache
def saturates() -> bool:
    """Whether the sums of uint8 times int8 that ONNX Runtime computes on this CPU are wrong where they are large."""
    rows, inner, columns = 4, 64, 32
    weight = numpy_helper.from_array(np.full((inner, columns), 127, np.int8), "weight")
    scales = (numpy_helper.from_array(np.array(1, np.float32), name) for name in ("scale", "weight_scale"))
    product = helper.make_node(_PRODUCT, ["x", "weight", "scale", "weight_scale"], ["y"], domain=_DOMAIN)
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [rows, inner])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [rows, columns])
    graph = helper.make_graph([product], "saturates", [x], [y], [weight, *scales])
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid(_DOMAIN, 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": np.full((rows, inner), 255, np.uint8)})
    return bool((found != 255 * 127 * inner).any())


def made_exact(content: bytes) -> tuple[bytes, GraphProto, frozenset[str]]:
    """A model whose products take uint8 weights, its graph, and the names of the weights that are other than stored.

    content: of a graph that was checked. Values of those weights are the stored bytes with the highest bit flipped.
    """
    model = ModelProto()
    model.ParseFromString(content)
    nodes = list(_nodes(model.graph))
    products = [node for node in nodes if node.op_type == _PRODUCT and len(node.input) <= _WEIGHT_ZERO]
    readers = Counter(name for node in nodes for name in node.input)
    of_products = Counter(node.input[_WEIGHT] for node in products)
    stored = {tensor.name: tensor for tensor in model.graph.initializer if tensor.data_type == TensorProto.INT8}
    changed = frozenset(name for name, count in of_products.items() if name in stored and readers[name] == count)
    for node in products:
        if node.input[_WEIGHT] in changed:
            node.input.extend([""] * (_WEIGHT_ZERO - len(node.input)) + [_ZERO_POINT])
    for name in changed:
        stored[name].data_type = TensorProto.UINT8
    if changed:
        model.graph.initializer.append(numpy_helper.from_array(np.array(128, np.uint8), _ZERO_POINT))
    return model.SerializeToString(), model.graph, changed


def _nodes(graph: GraphProto) -> Iterator[NodeProto]:
    """Those of the graph, and of the graphs inside."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _nodes(attribute.g)
