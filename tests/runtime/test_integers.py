"""Integer products that are exact on every CPU, in branches too."""

from __future__ import annotations

import numpy as np
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from popcompile.runtime.integers import made_exact, saturates

ROWS, INNER, COLUMNS = 3, 64, 24
RANDOM = np.random.default_rng(0)
X = RANDOM.integers(0, 256, (ROWS, INNER), dtype=np.uint8)
WEIGHT = RANDOM.integers(-127, 128, (INNER, COLUMNS)).astype(np.int8)
SCALES = RANDOM.random(COLUMNS, dtype=np.float32)


def product(read_elsewhere: bool = False) -> ModelProto:
    """An If whose branches multiply X by the weight of the graph around them."""
    arguments = ["x", "weight", "scale", "scales", "zero"]

    def branch(name: str) -> object:
        node = helper.make_node("MatMulIntegerToFloat", arguments, [name], domain="com.microsoft")
        return helper.make_graph([node], name, [], [helper.make_tensor_value_info(name, TensorProto.FLOAT, None)])

    nodes = [helper.make_node("If", ["which"], ["y"], then_branch=branch("one"), else_branch=branch("other"))]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [ROWS, COLUMNS])]
    if read_elsewhere:
        nodes.append(helper.make_node("Cast", ["weight"], ["read"], to=TensorProto.FLOAT))
        outputs.append(helper.make_tensor_value_info("read", TensorProto.FLOAT, [INNER, COLUMNS]))
    x = helper.make_tensor_value_info("x", TensorProto.UINT8, [ROWS, INNER])
    which = helper.make_tensor_value_info("which", TensorProto.BOOL, [])
    values = {"weight": WEIGHT, "scale": np.float32(0.5), "scales": SCALES, "zero": np.uint8(128)}
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in values.items()]
    graph = helper.make_graph(nodes, "product", [x, which], outputs, initializers)
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


@pytest.mark.parametrize("which", [True, False])
def test_products_are_exact(which: bool) -> None:
    content, graph, changed = made_exact(product().SerializeToString())
    assert changed == {"weight"}
    assert {t.name: t.data_type for t in graph.initializer}["weight"] == TensorProto.UINT8
    model = ModelProto()
    model.ParseFromString(content)
    for tensor in model.graph.initializer:  # here they stand in the model
        if tensor.name == "weight":
            tensor.raw_data = bytes(byte ^ 0x80 for byte in tensor.raw_data)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": X, "which": np.array(which)})
    expected = (X.astype(np.int64) - 128) @ WEIGHT.astype(np.int64) * 0.5 * SCALES
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_weight_that_something_else_reads_stays() -> None:
    content = product(read_elsewhere=True).SerializeToString()
    exact, _, changed = made_exact(content)
    assert not changed and exact == content


def test_what_saturates_is_wrong() -> None:
    """What is said of this CPU is so."""
    session = ort.InferenceSession(product().SerializeToString(), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {"x": X, "which": np.array(True)})
    expected = (X.astype(np.int64) - 128) @ WEIGHT.astype(np.int64) * 0.5 * SCALES
    assert saturates() == bool(np.abs(found - expected).max() > 1e-3 * np.abs(expected).max())
