"""Shapes as constants: less to compute for every token, and nothing of it in the memory of a GPU.

torch.onnx spells a shape out: the sizes of an input, each as a scalar, made vectors again and joined. A Reshape mostly
keeps the sizes that are free, which it can be told by zeros:

    Reshape(x [batch, tokens, 64], Concat(Shape.., Shape.., [4], [16]))  =>  Reshape(x, [0, 0, 4, 16])

What remains takes sizes from where they are. Such scalars are where ONNX Runtime's reuse of memory goes wrong, too: in
a branch, with CUDA, 1.31 gave one the memory of another that was still read, and a batch of one became as large as its
prompt (seen with tests/fake_gpu.py; gone without reuse, as in microsoft/onnxruntime#21349).
"""

from __future__ import annotations

import onnx_ir as ir
from onnxscript.optimizer import fold_constants
from onnxscript.rewriter import RewriteRuleSet
from onnxscript.rewriter.rules.common import collapse_slice_rule, squeeze_reshape_1d_rule

_RULES = RewriteRuleSet([squeeze_reshape_1d_rule, collapse_slice_rule])


def settle_shapes(model: ir.Model) -> None:
    """Replace computed shapes by constants where they are known, in place. What made them is left unused."""
    graph = model.graph
    for node in graph:
        count = node.attributes.get_int("end", 0) - node.attributes.get_int("start", 0)
        if node.op_type == "Shape" and count == 1:  # of a known rank, which the rules ask for
            node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
    fold_constants(model)
    _RULES.apply_to_model(model)
    for number, node in enumerate(n for n in graph if n.op_type == "Reshape"):
        data, shape = node.inputs
        output = node.outputs[0]
        if data is None or shape is None or shape.const_value is not None or not (data.shape and output.shape):
            continue
        if settled := _sizes(data.shape, output.shape):
            constant = ir.Value(name=f"reshape_{number}", const_value=ir.tensor(settled, dtype=ir.DataType.INT64))
            graph.register_initializer(constant)
            node.replace_input_with(1, constant)
            node.attributes.pop("allowzero", None)


def _sizes(before: ir.Shape, after: ir.Shape) -> list[int] | None:
    """Reshape's second input: 0 keeps a size that is free, one -1 is what remains. None where that does not say it."""
    sizes = []
    for place, size in enumerate(after):
        if isinstance(size, int):
            sizes.append(size)
        elif place < len(before) and size == before[place] and size != ir.SymbolicDim(None):
            sizes.append(0)
        else:
            sizes.append(-1)
    return sizes if sizes.count(-1) <= 1 and 0 not in after else None
