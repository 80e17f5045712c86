"""Scale input features of linear layers towards one size, so that a token's int8 scale fits all of them.

    rms_norm(x, g) -> linear(·, W)           =>  rms_norm(x, g / f) -> linear(·, W f)
    a · linear(x, V, b) -> linear(·, W)      =>  a · linear(x, V / f, b / f) -> linear(·, W f)
    a · chunk(linear(x, V, b), n)[i]         =>  the same, in the rows of V that make the chunk

QuantizeDynamic rounds a token's features to steps of its largest one's, so a few features that are always large take
the others' digits away. This is SmoothQuant's balance (Xiao et al., arXiv 2211.10438) by activations alone, because
weights, whose rounding costs little beside that of activations, need no share of it. Factors f, one for each
input feature, are measured on calibration text (popcompile/pruning/input_factors.py) and lie in the program's
constants; where there are none, as in a conversion that runs nothing, the graph stays as it is.

Only what QuantizeDynamic takes is balanced: the norm before a feed-forward block, if nothing else reads it, and what a
gated unit hands to its last linear layer. FoldParameters makes initializers of the scaled weights, with the names that
they have without factors, so a package's variants read them too.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from popcompile.upstream import OpOverload

from . import ops
from .base import Pass
from .graph import call_nodes, emit, emit_parameter, shape_of, value_of
from .onnx_ops import onnx_op_type
from .quantize_dynamic import dynamic_linears

aten = torch.ops.aten


class Balanceable(NamedTuple):
    """Features [.., F] that only linear layers in int8 read.

    features: the node that computes them. producer: the RMS norm or linear layer whose weights scale each of them.
    begin: of these weights, where it makes other features too. readers: the linear layers, in graph order.
    """

    features: fx.Node
    producer: fx.Node
    begin: int
    readers: tuple[fx.Node, ...]

    @property
    def constant(self) -> str:
        """What the program's constant with the features' factors [F] is called."""
        weight = self.readers[0].args[1]
        assert isinstance(weight, fx.Node)
        return f"{str(weight.target).rpartition('.')[0]}.input_factors"


def balanceable(gm: fx.GraphModule) -> list[Balanceable]:
    """All such features of a graph whose norms are not lowered, and whose weights are parameters as they are."""
    linears = set(dynamic_linears(gm))
    found = []
    for node in call_nodes(gm):
        readers = tuple(sorted(node.users))
        if not readers or not linears.issuperset(readers) or not all(map(_reads_parameter, readers)):
            continue
        if (producer := _producer(node, linears)) is not None:
            found.append(Balanceable(node, *producer, readers))
    return found


def _reads_parameter(linear: fx.Node) -> bool:
    weight = linear.args[1]
    return isinstance(weight, fx.Node) and weight.op == "get_attr"


def _producer(features: fx.Node, linears: set[fx.Node]) -> tuple[fx.Node, int] | None:
    """The node whose weights can scale each feature, from which of them on; None where something else reads these."""
    if features.target == ops.rms_norm:
        return features, 0
    if features.target != aten.mul.Tensor:
        return None
    shape = shape_of(features)
    factors = [n for n in features.all_input_nodes if len(n.users) == 1 and shape_of(n) == shape]
    return next((made for n in factors if (made := _made_by_linear(n, linears)) is not None), None)


def _made_by_linear(node: fx.Node, linears: set[fx.Node]) -> tuple[fx.Node, int] | None:
    """The linear layer whose result this is, or a chunk of which, and the first of its features."""
    if node in linears:
        return node, 0
    if node.target != operator.getitem:
        return None
    chunk, index = node.args
    assert isinstance(chunk, fx.Node) and isinstance(index, int)
    if chunk.target != aten.chunk.default:
        return None
    whole, count, *axis = chunk.args
    assert isinstance(whole, fx.Node) and isinstance(count, int)
    size, last = shape_of(whole)[-1], len(shape_of(whole)) - 1
    if whole not in linears or len(whole.users) > 1 or axis not in ([-1], [last]):
        return None
    return whole, index * -(-size // count)


class BalanceActivations(Pass):
    stages = ("prefill", "decode")

    def requires(self, graph_module: fx.GraphModule) -> None:
        lowered = {onnx_op_type(n) for n in call_nodes(graph_module)} & {"SimplifiedLayerNormalization"}
        self.check(not lowered, "norms are lowered afterwards")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        for found in balanceable(graph_module):
            if found.constant in self.program.constants:
                _balance(graph_module, found)
                self.matches += 1
        return PassResult(graph_module, self.matches > 0)


def _balance(gm: fx.GraphModule, found: Balanceable) -> None:
    producer, readers = found.producer, found.readers
    weight = producer.args[1]
    assert isinstance(weight, fx.Node)
    with gm.graph.inserting_before(producer):
        factors = emit_parameter(gm, found.constant, [shape_of(found.features)[-1]], value_of(weight).dtype)
        if producer.target == ops.rms_norm:
            producer.update_arg(1, emit(gm.graph, aten.div.Tensor, weight, factors, like=producer))
        else:
            made, size = shape_of(producer)[-1], shape_of(found.features)[-1]
            by = factors
            if made != size:
                others = [found.begin, made - found.begin - size]
                by = emit(gm.graph, aten.constant_pad_nd.default, factors, others, 1.0, like=producer)
            rows = emit(gm.graph, aten.unsqueeze.default, by, 1, like=producer)
            producer.update_arg(1, _scaled(gm.graph, aten.div.Tensor, weight, rows, producer))
            for index, bias in enumerate(producer.args[2:], 2):
                producer.update_arg(index, emit(gm.graph, aten.div.Tensor, bias, by, like=producer))
    for reader in readers:
        with gm.graph.inserting_before(reader):
            reader.update_arg(1, _scaled(gm.graph, aten.mul.Tensor, reader.args[1], factors, reader))


def _scaled(graph: fx.Graph, scale: OpOverload, weight: Any, by: fx.Node, like: fx.Node) -> fx.Node:
    """A linear layer's weight, divided or multiplied, under its own name."""
    node = emit(graph, scale, weight, by, like=like)
    node.meta["parameter"] = weight.meta.get("parameter", str(weight.target))
    return node
