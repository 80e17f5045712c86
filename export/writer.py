"""Write a lowered FX graph down as an ONNX graph: a rule for each operator that lowering leaves (operators.py).

The graph is not traced again, and no pass of torch.onnx runs over it. What it says of itself is kept: shapes by their
free dimensions, and names of nodes by where they live, /model/layers.3/self_attn/q_proj/MatMul. Parameters come out as
initializers without a value, which weights.py points into the package's external data file.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from popcompile.passes.graph import (
    cache_of,
    dimension_symbols,
    inputs_of,
    is_size,
    mask_of,
    outputs_of,
    settled,
    shape_of,
    tokens_of,
    value_of,
)
from popcompile.passes.onnx_ops import CONTRIB

OPSET = 21
#: free dimensions under the names that runtimes and their users know, and what each is read from, along which axis
_FREE: dict[str, tuple[str, Callable[[fx.GraphModule], fx.Node], int]] = {
    "batch": ("batch_size", tokens_of, 0),
    "sequence": ("sequence_length", tokens_of, 1),
    "total": ("total_sequence_length", mask_of, 1),
    "past": ("past_sequence_length", lambda gm: cache_of(gm)[0], 2),
}
_DTYPES = {
    torch.float32: ir.DataType.FLOAT, torch.float16: ir.DataType.FLOAT16, torch.bfloat16: ir.DataType.BFLOAT16,
    torch.int64: ir.DataType.INT64, torch.int32: ir.DataType.INT32, torch.int8: ir.DataType.INT8,
    torch.uint8: ir.DataType.UINT8, torch.bool: ir.DataType.BOOL,
}  # fmt: skip

#: of sizes, which are positive
_ARITHMETIC: dict[Any, str] = {
    operator.add: "Add", operator.sub: "Sub", operator.mul: "Mul", operator.floordiv: "Div", torch.sym_min: "Min",
    torch.sym_max: "Max",
}  # fmt: skip

#: writes a node down; returns its value, or those of a node with several
Rule = Callable[["Writer", fx.Node], Any]


class Writer:
    """A graph that is being written. Sizes are vectors of one number, as Reshape, Expand and Slice take them."""

    def __init__(self, gm: fx.GraphModule, name: str, input_names: Sequence[str]) -> None:
        self.graph = ir.Graph([], [], nodes=[], opset_imports={"": OPSET, CONTRIB: 1}, name=name)
        symbols = dimension_symbols(gm)
        free = {symbol: _FREE[name] for name, symbol in symbols.items() if name in _FREE}
        self._free = {symbol: (source(gm), axis) for symbol, (_, source, axis) in free.items()}
        known = {symbol: name for name, symbol in symbols.items()} | {s: of[0] for s, of in free.items()}
        self._names = {symbol: type(symbol)(name, integer=True) for symbol, name in known.items()}
        self._values: dict[fx.Node, Any] = {}
        self._constants: dict[tuple[str, ir.DataType], ir.Value] = {}
        self._kept: dict[Any, ir.Value] = {}
        self._used: Counter[str] = Counter()
        self._scope = ""
        for node, given in zip(inputs_of(gm).values(), input_names, strict=True):
            self._values[node] = self._typed(ir.Value(name=given), value_of(node))
            self.graph.inputs.append(self._values[node])

    # --- what rules read -----------------------------------------------------------------------------------------

    def __getitem__(self, node: Any) -> Any:
        """The value that a node computes, or its values; a size as a vector of one number; None of None."""
        if node is None:
            return None
        if is_size(node):
            return self.size(node)
        return self._values[node]

    def operand(self, argument: Any, dtype: torch.dtype) -> ir.Value:
        """An argument of an element-wise operator that computes in `dtype`: a tensor, a size, or a number."""
        if not isinstance(argument, fx.Node):
            return self.constant(argument, dtype)
        if is_size(argument):
            return self.cast(self("Squeeze", self.size(argument)), dtype)
        return self.cast(self[argument], dtype)

    def size(self, size: int | fx.Node) -> ir.Value:
        """A dimension, [1] int64."""
        if isinstance(size, int):
            return self.constant([size])
        value = value_of(size)
        if isinstance(value, int):
            return self.constant([value])
        if size.target in _ARITHMETIC:
            sizes: Sequence[Any] = size.args
            return self.kept(size, lambda: self(_ARITHMETIC[size.target], *map(self.size, sizes)))
        assert size.target == torch.ops.aten.sym_size.int, f"{size.name} is no size that is known"
        x, axis = size.args
        assert isinstance(x, fx.Node) and isinstance(axis, int)
        return self._free_size(value.node.expr, x, axis)

    def sizes(self, sizes: Sequence[int | fx.Node]) -> ir.Value:
        """Several dimensions, [N] int64."""
        if all(isinstance(size, int) for size in sizes):
            return self.constant(list(sizes))
        return self("Concat", *map(self.size, sizes), axis=0, dtype=torch.int64)

    def dimension(self, x: fx.Node, axis: int) -> ir.Value:
        """A dimension of a value, [1] int64."""
        size = shape_of(x)[axis]
        if isinstance(size, int):
            return self.constant([size])
        return self._free_size(size.node.expr, x, axis)

    def sizes_of(self, value: ir.Value) -> ir.Value:
        """All dimensions of a value, [N] int64."""
        made: ir.Value = self("Shape", value)
        made.shape = None
        return made

    def _free_size(self, expression: Any, x: fx.Node, axis: int) -> ir.Value:
        source, place = self._free.get(expression, (x, axis))
        return self.kept(expression, lambda: self("Shape", self[source], start=place, end=place + 1))

    def kept(self, key: Any, make: Callable[[], ir.Value]) -> ir.Value:
        """What `make` writes, once for a key."""
        if key not in self._kept:
            self._kept[key] = make()
        return self._kept[key]

    def constant(self, value: Any, dtype: torch.dtype = torch.int64) -> ir.Value:
        """A number, or a list of them."""
        key = (repr(value), _DTYPES[dtype])
        if key not in self._constants:
            tensor = ir.tensor(value, dtype=_DTYPES[dtype])
            constant = ir.Value(
                name=f"constant_{len(self._constants)}", type=ir.TensorType(tensor.dtype),
                shape=ir.Shape([len(value)] if isinstance(value, list) else []), const_value=tensor,
            )  # fmt: skip
            self.graph.register_initializer(constant)
            self._constants[key] = constant
        return self._constants[key]

    def cast(self, value: ir.Value, dtype: torch.dtype) -> ir.Value:
        if value.dtype == _DTYPES[dtype]:
            return value
        cast: ir.Value = self("Cast", value, to=int(_DTYPES[dtype]), dtype=dtype)
        cast.shape = value.shape
        return cast

    # --- what rules write ----------------------------------------------------------------------------------------

    def __call__(
        self,
        op: str,
        *inputs: ir.Value | None,
        dtype: torch.dtype | None = None,
        outputs: int | None = None,
        domain: str = "",
        **attributes: Any,
    ) -> Any:
        """Append an operator; returns its output, or a tuple of `outputs`.

        dtype: of what it computes, by default that of its first input; of several outputs it is left open.
        """
        name = self._name(op)
        node = ir.node(op, inputs, attributes or None, domain=domain, num_outputs=outputs or 1, name=name)
        self.graph.append(node)
        for i, output in enumerate(node.outputs):
            output.name = f"{name}_output_{i}"
        if outputs is not None:
            return tuple(node.outputs)
        if op == "Shape":
            node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        elif dtype is not None:
            node.outputs[0].type = ir.TensorType(_DTYPES[dtype])
        elif inputs and inputs[0] is not None:
            node.outputs[0].type = inputs[0].type
        return node.outputs[0]

    def _name(self, op: str) -> str:
        name = f"{self._scope}/{op}"
        self._used[name] += 1
        return name if self._used[name] == 1 else f"{name}_{self._used[name] - 1}"

    def take(self, graph: ir.Graph, inputs: Sequence[ir.Value]) -> tuple[ir.Value, ...]:
        """Take over another graph's operators, over these inputs; returns its outputs."""
        outputs, nodes = list(graph.outputs), list(graph)
        graph.outputs.clear()
        ours = dict(zip(graph.inputs, inputs, strict=True))
        for value in list(graph.initializers.values()):
            assert value.const_value is not None
            ours[value] = self._taken(value.const_value)
        for theirs, value in ours.items():
            ir.convenience.replace_all_uses_with(theirs, value)
        graph.remove(nodes)
        for node in nodes:
            node.name = self._name(node.op_type)
            node.metadata_props.clear()
            node.doc_string = None
            for i, output in enumerate(node.outputs):
                output.name, output.shape = f"{node.name}_output_{i}", None
            self.graph.append(node)
        return tuple(ours.get(output, output) for output in outputs)  # some are constants, such as a range of indices

    def _taken(self, tensor: Any) -> ir.Value:
        name = f"constant_{len(self.graph.initializers)}_taken"
        shape = ir.Shape([int(size) for size in tensor.shape])
        constant = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
        self.graph.register_initializer(constant)
        return constant

    def parameter(self, node: fx.Node) -> None:
        """A get_attr node as an initializer without a value."""
        name = str(node.target)
        if name not in self.graph.initializers:
            self.graph.initializers.add(self._typed(ir.Value(name=name), value_of(node)))
        self._values[node] = self.graph.initializers[name]

    def write(self, node: fx.Node, rule: Rule, otherwise: Rule) -> None:
        """What a rule makes of a node, with the shape and type that the node has. otherwise: for calls that the rule
        answers with NotImplemented.
        """
        self._scope = _scope(node)
        made = rule(self, node)
        if made is NotImplemented:
            made = otherwise(self, node)
        self._values[node] = made
        fakes = value_of(node)
        if not isinstance(made, tuple):
            made, fakes = (made,), (fakes,)
        for value, fake in zip(made, fakes, strict=True):
            if value.producer() is not None:  # and not an input or parameter that is handed on
                self._typed(value, fake)

    def finish(self, gm: fx.GraphModule, names: Sequence[str]) -> ir.Graph:
        """The graph, returning what `gm` returns under these names."""
        self._scope = ""
        for node, name in zip(outputs_of(gm), names, strict=True):
            value = self[node]
            if value.producer() is None or value.is_graph_output():
                value = self._typed(self("Identity", value), value_of(node))
            value.name = name
            self.graph.outputs.append(value)
        return self.graph

    def _typed(self, value: ir.Value, fake: torch.Tensor) -> ir.Value:
        value.type = ir.TensorType(_DTYPES[fake.dtype])
        value.shape = ir.Shape([self._dimension(size) for size in fake.shape])
        return value

    def _dimension(self, size: Any) -> int | str:
        size = settled(size)
        return str(size.node.expr.xreplace(self._names)) if isinstance(size, torch.SymInt) else int(size)


def _scope(node: fx.Node) -> str:
    """Where a node lives: /model/layers.3/self_attn/q_proj."""
    modules = list((node.meta.get("nn_module_stack") or {"": ("", "")}).values())
    path = str(modules[-1][0]).removeprefix("decoder").strip(".")
    parts: list[str] = []
    for part in path.split(".") if path and "empty_nn_module" not in path else []:
        if part.isdigit() and parts:
            parts[-1] += f".{part}"
        else:
            parts.append(part)
    return "".join(f"/{part}" for part in parts)
