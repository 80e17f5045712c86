"""Two graphs in one: for a single token per row, and for several.

    logits, *present = If there is one token per row: one(input_ids, attention_mask, *past)
                       else: several(input_ids, attention_mask, *past)

A runtime that loads one decoder runs tokens through the one and prompts through the other. The choice is made once for
the whole graph: one in every layer takes a twentieth of a small model's time for a token. Both branches read the same
initializers, those of the graph around them, and ONNX Runtime packs a matrix for its kernels once in a session, however
many nodes read it (MatMulNBits since 1.28).
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.traversal import RecursiveGraphIterator

from .inputs import tokens_input


def choose_by_tokens(one: ir.Model, several: ir.Model) -> ir.Model:
    """A model that is `one` for input_ids [batch, 1], and `several` for more tokens; it has the inputs and outputs that
    both have. Takes both apart.

    Initializers without a value are parameters: those of one name are the same.
    """
    inputs, outputs = _like(several.graph.inputs), _like(several.graph.outputs)
    graph = ir.Graph(inputs, [], nodes=[], opset_imports=several.opset_imports, name=several.graph.name)
    constant = ir.Value(name="/tokens/one", const_value=ir.tensor([1], dtype=ir.DataType.INT64))
    graph.register_initializer(constant)
    _fix_tokens(one.graph, constant)
    then, other = _branch(graph, "one_token", one.graph), _branch(graph, "several_tokens", several.graph)
    tokens = ir.node("Shape", [tokens_input(graph)], {"start": 1, "end": 2}, name="/tokens/Shape")
    equal = ir.node("Equal", [tokens.outputs[0], constant], name="/tokens/Equal")
    single = ir.node("Squeeze", [equal.outputs[0]], name="/tokens/Squeeze")
    branches = {"then_branch": then, "else_branch": other}
    choice = ir.node("If", [single.outputs[0]], branches, outputs=outputs, name="/If")
    graph.extend([tokens, equal, single, choice])
    graph.outputs.extend(outputs)
    for node in (tokens, equal, single):
        node.outputs[0].name = f"{node.name}_output"
    return ir.Model(graph, ir_version=several.ir_version)


def _like(values: Sequence[ir.Value]) -> list[ir.Value]:
    """Values of the same names, types and shapes, of no graph yet."""
    return [ir.Value(name=value.name, type=value.type, shape=value.shape) for value in values]


def _fix_tokens(graph: ir.Graph, count: ir.Value) -> None:
    """Put a constant [1] in the place of the number of tokens, for ONNX Runtime to fold what follows from it."""
    tokens = tokens_input(graph)
    for node in graph:
        if node.op_type == "Shape" and node.inputs[0] is tokens and node.attributes.get_int("start", 0) == 1:
            ir.convenience.replace_all_uses_with(node.outputs[0], count)
            graph.remove(node, safe=True)


def _branch(graph: ir.Graph, name: str, branch: ir.Graph) -> ir.Graph:
    """A graph as a branch inside `graph`, which takes over its initializers and gives it its inputs."""
    for outer, inner in zip(graph.inputs, branch.inputs, strict=True):
        ir.convenience.replace_all_uses_with(inner, outer)
    branch.inputs.clear()
    for key, value in list(branch.initializers.items()):
        del branch.initializers[key]
        if value.const_value is None and key in graph.initializers:
            ir.convenience.replace_all_uses_with(value, graph.initializers[key])
            continue
        if value.const_value is not None:
            value.name = f"{name}/{key}"
        graph.initializers.add(value)
    for node in RecursiveGraphIterator(branch):
        node.name = f"/{name}{node.name}"
        for output in node.outputs:
            output.name = output.name and f"{name}/{output.name}"
    branch.name = name
    return branch
