"""An operator without a rule of its own, written by torch.onnx: whatever else a traced model may hold.

The operator alone is exported, as a graph of a single call over inputs of the same shapes, and what comes out is put
into the graph that is being written. It takes about a second, where a rule takes none.
"""

from __future__ import annotations

import contextlib
import io
import operator
import warnings
from collections.abc import Iterator
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.passes.common import (
    CommonSubexpressionEliminationPass,
    IdentityEliminationPass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    RemoveUnusedNodesPass,
    ShapeInferencePass,
)
from onnxscript.optimizer import fold_constants
from torch import fx
from torch.fx.node import map_arg

from popcompile.passes.fake_values import alike
from popcompile.passes.graph import is_size, shape_of, value_of
from popcompile.passes.ops import REFERENCE
from popcompile.quiet import errors_only
from popcompile.upstream import FakeTensorMode, export

from .writer import OPSET, Writer

#: graphs of single calls, by what a call is: models repeat theirs in every layer
_written: dict[str, ir.Graph] = {}


def write_foreign(writer: Writer, node: fx.Node) -> Any:
    """The value of a call, or its values, written by torch.onnx."""
    inputs, alone = _alone(node)
    arguments, shapes = _arguments(inputs)
    key = f"{alone} {[(a.dtype, a.shape) for a in arguments]} {shapes}"
    if key not in _written:
        _written[key] = _export(alone, arguments, shapes)
    values = writer.take(_written[key].clone(), [writer[source] for source in inputs])
    return values if isinstance(value_of(node), tuple | list) else values[0]


def _export(call: fx.Graph, arguments: list[torch.Tensor], shapes: list[dict[int, Any]]) -> ir.Graph:
    """The graph of a call alone, over arguments of these shapes."""
    module = fx.GraphModule(torch.nn.Module(), call)
    with _quiet(), torch.no_grad():
        traced = export(module, tuple(arguments), tuple(shapes), alike)
        exported = torch.onnx.export(traced, opset_version=OPSET, dynamo=True, optimize=False, verbose=False)
        assert exported is not None
        model: ir.Model = exported.model
        fold_constants(model)
        for rewrite in (
            CommonSubexpressionEliminationPass(),
            IdentityEliminationPass(),
            LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
            RemoveUnusedNodesPass(),
            NameFixPass(),
        ):
            rewrite(model)
        ShapeInferencePass(check_type=False, strict_mode=False)(model)  # types of the values in between
    return model.graph


def _alone(node: fx.Node) -> tuple[list[fx.Node], fx.Graph]:
    """The tensors that a call reads, and a graph of the call alone; sizes are read from these tensors again."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = list(dict.fromkeys(t for source in node.all_input_nodes for t in _tensors(source)))
    for place, source in enumerate(inputs):
        copies[source] = graph.placeholder(f"x{place}")

    def copied(source: fx.Node) -> fx.Node:
        if source not in copies:
            args, kwargs = map_arg((source.args, source.kwargs), copied)
            copies[source] = graph.create_node(source.op, source.target, args, kwargs, f"size{len(copies)}")
        return copies[source]

    args, kwargs = map_arg((node.args, node.kwargs), copied)
    target: Any = node.target
    call = graph.create_node("call_function", REFERENCE.get(target, target), args, kwargs, "call")
    value = value_of(node)
    several = range(len(value)) if isinstance(value, tuple | list) else ()
    graph.output(tuple(graph.call_function(operator.getitem, (call, i)) for i in several) or (call,))
    return inputs, graph


def _tensors(source: fx.Node) -> list[fx.Node]:
    """A tensor itself, or those that a size is computed from."""
    return [t for other in source.all_input_nodes for t in _tensors(other)] if is_size(source) else [source]


def _arguments(inputs: list[fx.Node]) -> tuple[list[torch.Tensor], list[dict[int, Any]]]:
    """Tensors without values in the shapes of these, and which of their sizes are free."""
    dims: dict[str, torch.export.Dim] = {}
    arguments, shapes = [], []
    with FakeTensorMode():
        for node in inputs:
            shape = shape_of(node)
            free = {i: str(d) for i, d in enumerate(shape) if isinstance(d, torch.SymInt)}
            shapes.append({i: dims.setdefault(d, torch.export.Dim(f"d{len(dims)}")) for i, d in free.items()})
            sizes = [3 + list(dims).index(free[i]) if i in free else d for i, d in enumerate(shape)]
            arguments.append(torch.zeros(sizes, dtype=value_of(node).dtype))
    return arguments, shapes


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without torch.onnx's progress lines, its warnings about missing packages, and the logs of what it is built on."""
    with (
        contextlib.redirect_stdout(io.StringIO()),
        warnings.catch_warnings(action="ignore"),
        errors_only("torch.onnx", "onnxscript", "onnx_ir"),
    ):
        yield
