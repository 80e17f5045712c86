"""What the rewriting of attention in an ONNX graph is built of: operators, sizes that all layers share, branches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import onnx_ir as ir

from popcompile.passes.onnx_ops import CONTRIB

from .inputs import mask_input, tokens_input

END = 2**62  # of a Slice: as far as there is something
#: blocks of a prompt that is cut into longer ones than it has to be, at least
_FEWEST = 16


class Emitter:
    """Appends operators to a list of nodes, each with a name of its own."""

    def __init__(self, prefix: str, constant: Callable[[Any], ir.Value]) -> None:
        self.prefix, self._constant, self.nodes = prefix, constant, list[ir.Node]()

    def __call__(self, op: str, *inputs: Any, outputs: int | None = None, domain: str = "", **attributes: Any) -> Any:
        """The operator's output, or a tuple of `outputs`. Inputs that are numbers, or lists of them, are constants."""
        name = f"{self.prefix}/{op}_{len(self.nodes)}"
        values = [i if i is None or isinstance(i, ir.Value) else self._constant(i) for i in inputs]
        node = ir.node(op, values, attributes or None, domain=domain, num_outputs=outputs or 1, name=name)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}_output_{i}"
        self.nodes.append(node)
        return node.outputs[0] if outputs is None else tuple(node.outputs)


class Cut(NamedTuple):
    """How a prompt is split into blocks.

    size: queries per full block, int64 [1]. whole: number of full blocks before the last one, which may be shorter,
    int64 scalar. last: first query of the last block, int64 [1].
    """

    size: ir.Value
    whole: ir.Value
    last: ir.Value


class Emitters:
    """Emitters for the parts of a graph, which share its constants. name: of these."""

    def __init__(self, graph: ir.Graph, name: str) -> None:
        self.graph, self._name = graph, name
        self._constants: dict[str, ir.Value] = {}

    def emitter(self, prefix: str) -> Emitter:
        return Emitter(prefix, self._constant)

    def _constant(self, value: Any) -> ir.Value:
        if (constant := self._constants.get(repr(value))) is None:
            tensor = ir.tensor(value, dtype=ir.DataType.BOOL if isinstance(value, bool) else ir.DataType.INT64)
            shape = ir.Shape([len(value)] if isinstance(value, list) else [])
            name = f"{self._name}_constant_{len(self._constants)}"
            constant = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
            self.graph.register_initializer(constant)
            self._constants[repr(value)] = constant
        return constant


class Shared(Emitters):
    """What all layers need, computed once.

    batch, tokens, before, after: B, S, T - S and T, [1] each. cuts: for attention with a window, and without.
    single: whether there is one block. one_row: whether there is one row.
    """

    def __init__(self, graph: ir.Graph, block: int, windows: set[bool], tails: bool = False) -> None:
        super().__init__(graph, "attention")
        emit = self.emitter("/attention")
        ids, mask = tokens_input(graph), mask_input(graph)
        self.tokens = emit("Shape", ids, start=1, end=2)
        self.after = emit("Shape", mask, start=1, end=2)
        self.before = emit("Sub", self.after, self.tokens)
        if block or tails:
            self.batch = emit("Shape", ids, start=0, end=1)
        if tails:
            self.one_row = emit("Equal", emit("Squeeze", self.batch), 1)
        if block:
            self.cuts = {window: self._cut(emit, block, window) for window in sorted(windows)}
            self.single = emit("Equal", next(iter(self.cuts.values())).whole, 0)
        graph.insert_before(graph[0], emit.nodes)

    def _cut(self, emit: Emitter, block: int, window: bool) -> Cut:
        size: Any = [block]
        if not window:
            size = emit("Mul", emit("Max", emit("Div", self.tokens, [_FEWEST * block]), [1]), size)
        size = emit("Where", emit("Equal", self.batch, [1]), size, self.tokens)
        whole = emit("Div", emit("Sub", self.tokens, [1]), size)
        return Cut(size, emit("Squeeze", whole), emit("Mul", whole, size))

    def write(self, emit: Emitter, past: ir.Value | None, new: ir.Value | None) -> ir.Value:
        """A cache with new entries [B, kv heads, S, head size] at slots [before, after)."""
        kept = emit("Slice", past, [0], self.before, [2])
        room = emit("Slice", past, self.after, [END], [2])
        present: ir.Value = emit("Concat", kept, new, room, axis=2)
        return present


def rewrite(graph: ir.Graph, nodes: Sequence[ir.Node], emit: Emitter, outputs: Sequence[ir.Value]) -> None:
    """Put what was emitted in the place of nodes, whose first one's outputs are now `outputs`, under their names."""
    first = nodes[0]
    graph.insert_before(first, emit.nodes)
    for old, new in zip(first.outputs, outputs, strict=True):
        new.type, new.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = None, old.name
    graph.remove(nodes, safe=True)


Branch = tuple[Emitter, Sequence[ir.Value]]


def choose(
    emit: Emitter, attention: ir.Node, condition: ir.Value, then_branch: Branch, else_branch: Branch
) -> Sequence[ir.Value]:
    """One of two branches, each an emitter and what it made in place of the attention's outputs."""
    branches: dict[str, Any] = {}
    for key, (into, outputs) in (("then_branch", then_branch), ("else_branch", else_branch)):
        for value, old in zip(outputs, attention.outputs, strict=True):
            value.type, value.shape = old.type, old.shape
        branches[key] = ir.Graph([], outputs, nodes=into.nodes, name=into.prefix.rsplit("/", 1)[1])
    chosen: Sequence[ir.Value] = emit("If", condition, outputs=3, **branches)
    return chosen


def like(emit: Emitter, attention: ir.Node, *inputs: ir.Value | None) -> Any:
    """The same operator with other inputs: output, present key, present value."""
    attributes = {name: attribute.value for name, attribute in attention.attributes.items()}
    return emit(attention.op_type, *inputs, outputs=3, domain=attention.domain, **attributes)


def rotate(
    emit: Emitter, x: ir.Value, positions: ir.Value, tables: Sequence[ir.Value], heads: int, head_size: int
) -> ir.Value:
    """RoPE of x [B, S, heads x head size]; positions [B, S], or [1] of the first token of every row."""
    rotated = 2 * width_of(tables[0], 1)
    sizes = {"num_heads": heads, "rotary_embedding_dim": rotated if rotated < head_size else 0}
    made: ir.Value = emit("RotaryEmbedding", x, positions, *tables, domain=CONTRIB, **sizes)
    return made


def width_of(value: ir.Value | None, dimension: int) -> int:
    """A dimension that is a number."""
    assert value is not None and value.shape is not None
    width = value.shape[dimension]
    assert isinstance(width, int)
    return width
