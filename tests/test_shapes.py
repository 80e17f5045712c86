"""Shapes of ONNX graphs as constants (export/shapes.py)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx_ir.passes.common import IdentityEliminationPass, RemoveUnusedNodesPass

from popcompile.export.shapes import settle_shapes

HEADER = '<ir_version: 10, opset_import: ["" : 21]>'


def settled(text: str) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """A graph as it was and as settle_shapes leaves it, without what is unused."""
    before = onnx.parser.parse_model(f"{HEADER} {text}")
    model = ir.from_proto(before)
    settle_shapes(model)
    for clean in (IdentityEliminationPass(), RemoveUnusedNodesPass()):  # as export does
        clean(model)
    return before, ir.to_proto(model)


def outputs(model: onnx.ModelProto, *inputs: np.ndarray) -> list[np.ndarray]:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, dict(zip((i.name for i in session.get_inputs()), inputs, strict=True)))


HEADS = """heads (float[batch, tokens, 64] x, float[batch, total] mask) => (float[batch, tokens, 4, 16] y)
<float[batch, tokens, 4, 16] y> {
    b1 = Shape<start=0, end=1>(x)
    b = Squeeze(b1)
    t1 = Shape<start=1, end=2>(x)
    t = Squeeze(t1)
    free = Constant<value_ints=[-1]>()
    bv = Reshape<allowzero=1>(b, free)
    tv = Reshape<allowzero=1>(t, free)
    rest = Constant<value_ints=[4, 16]>()
    shape = Concat<axis=0>(bv, tv, rest)
    y = Reshape<allowzero=1>(x, shape)
}"""


@pytest.mark.parametrize("sizes", [(2, 3), (1, 1), (1, 0)])
def test_sizes_that_stay_are_not_computed(sizes: tuple[int, int]) -> None:
    before, after = settled(HEADS)
    assert [node.op_type for node in after.graph.node] == ["Reshape"]
    inputs = np.random.default_rng(0).normal(size=(*sizes, 64)).astype(np.float32), np.ones((sizes[0], 5), np.float32)
    for expected, found in zip(outputs(before, *inputs), outputs(after, *inputs), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_sizes_of_something_else_are_taken_from_there() -> None:
    """Two sizes that the reshaped tensor does not have: [batch * tokens, 4] => [batch, tokens, 4]."""
    before, after = settled("""rows (float[rows, 4] x, float[batch, tokens] like) => (float[batch, tokens, 4] y)
    <float[batch, tokens, 4] y> {
        b1 = Shape<start=0, end=1>(like)
        b = Squeeze(b1)
        t1 = Shape<start=1, end=2>(like)
        t = Squeeze(t1)
        free = Constant<value_ints=[-1]>()
        bv = Reshape(b, free)
        tv = Reshape(t, free)
        rest = Constant<value_ints=[4]>()
        shape = Concat<axis=0>(bv, tv, rest)
        y = Reshape(x, shape)
    }""")
    assert [node.op_type for node in after.graph.node if node.op_type != "Constant"] == [
        "Shape", "Shape", "Concat", "Reshape"
    ]  # fmt: skip
    inputs = np.arange(24, dtype=np.float32).reshape(6, 4), np.zeros((2, 3), np.float32)
    for expected, found in zip(outputs(before, *inputs), outputs(after, *inputs), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_packages(tiny_package: Path) -> None:
    """What is a shape there is a constant, or joined from sizes without arithmetic."""
    graphs = [
        onnx.load(tiny_package / f"{stage}.onnx", load_external_data=False).graph for stage in ("prefill", "decode")
    ]
    for graph in graphs:
        graphs += [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    nodes = {(id(graph), output): node for graph in graphs for node in graph.node for output in node.output}
    shapes = [nodes.get((id(g), node.input[1])) for g in graphs for node in g.node if node.op_type == "Reshape"]
    assert {node.op_type for node in shapes if node} <= {"Concat"}
    assert "CastLike" not in {node.op_type for node in nodes.values()}
