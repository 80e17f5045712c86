"""A graph as readable code, for `popcompile inspect --pass` and for tests.

One line a node: `name = op(arguments)  # dtype[dimensions]`, grouped by layer; parameters appear under their own names
and sizes under the names of the free dimensions (batch, sequence, past, total).
"""

from __future__ import annotations

import operator
from functools import lru_cache
from typing import Any

import sympy
import torch
from torch import fx

from popcompile.upstream import OpOverload, operator_name

from .graph import dimension_names, inputs_of, is_size, layer_of, output_of, value_of
from .onnx_ops import attributes_of, onnx_inputs, onnx_op_type

_DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.bool: "bool",
}


def print_graph(gm: fx.GraphModule, name: str = "graph") -> str:
    """The graph as text, ending in a newline."""
    names = dimension_names(gm)
    lines = [f"def {name}("]
    for node in inputs_of(gm).values():
        lines.append(f"    {node.name}: {_type(value_of(node), names)},")
    lines.append("):")
    layer: Any = "start"
    for node in gm.graph.nodes:
        if node.op != "call_function" or is_size(node):
            continue
        if layer_of(node) != layer:
            layer = layer_of(node)
            lines.append(f"    # {'layer ' + str(layer) if layer is not None else 'outside the layers'}")
        lines.append(f"    {node.name} = {_call(node, names)}  # {_comment(node, names)}")
    lines.append(f"    return {_argument(output_of(gm).args[0], names)}")
    return "\n".join(lines) + "\n"


def _call(node: fx.Node, names: dict[str, str]) -> str:
    if onnx_op_type(node):
        arguments = [_argument(a, names) for a in onnx_inputs(node)]
        arguments += [f"{k}={v!r}" for k, v in attributes_of(node).items()]
        return f"onnx.{onnx_op_type(node)}({', '.join(arguments)})"
    if node.target is operator.getitem:
        return f"{_argument(node.args[0], names)}[{node.args[1]}]"
    arguments = [_argument(a, names) for a in node.args]
    arguments += [f"{k}={_argument(v, names)}" for k, v in node.kwargs.items()]
    return f"{_target(node.target)}({', '.join(arguments)})"


def _target(target: Any) -> str:
    if isinstance(target, OpOverload):
        return operator_name(target)
    return getattr(target, "__name__", str(target))


def _argument(value: Any, names: dict[str, str]) -> str:
    if isinstance(value, fx.Node):
        if value.op == "get_attr":
            return str(value.target)
        if is_size(value):
            return _dim(value_of(value), names)
        return value.name
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(v, names) for v in value)}]"
    return repr(value)


def _dim(dim: Any, names: dict[str, str]) -> str:
    return _named(dim.node.expr, tuple(names.items())) if isinstance(dim, torch.SymInt) else str(dim)


@lru_cache(maxsize=4096)  # a graph has thousands of dimensions, and few different ones
def _named(dim: sympy.Expr, names: tuple[tuple[str, str], ...]) -> str:
    named = dict(names)
    return str(dim.subs({s: sympy.Symbol(named.get(str(s), str(s))) for s in dim.free_symbols}))


def _type(value: Any, names: dict[str, str]) -> str:
    if not isinstance(value, torch.Tensor):
        return ", ".join(_type(v, names) for v in value) if isinstance(value, list | tuple) else type(value).__name__
    dtype = _DTYPES.get(value.dtype, str(value.dtype).removeprefix("torch."))
    return f"{dtype}[{', '.join(_dim(d, names) for d in value.shape)}]"


def _comment(node: fx.Node, names: dict[str, str]) -> str:
    role = node.meta.get("role")
    return _type(node.meta.get("val"), names) + (f" {role}" if role else "")
