"""Attention over a long prompt in blocks of queries, for providers whose GroupQueryAttention computes the whole square.

On the CPU GroupQueryAttention multiplies every query with every key and masks half of the products away. A block of
queries that follows a past multiplies with the keys up to its own end only, so blocks over growing prefixes compute
little more than the triangle:

    out, present = GroupQueryAttention(q, k, v, past)
    =>  Loop over blocks [begin, end) of queries:
            o, past = GroupQueryAttention(q[begin:end], k[begin:end], v[begin:end], past)
            out = Concat(out, o)

The operator takes several tokens after a past for one row only, so a batch, or a row with padding, is one block. With a
sliding window a block is given no keys but its window's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from popcompile.passes.onnx_ops import CONTRIB


def attend_in_blocks(model: ir.Model, block: int) -> int:
    """Rewrite each attention over the prompt's tokens, in place; returns how many. block: queries per block.

    Attention of a single query, the boundary token's, stays.
    """
    found = [n for n in model.graph if n.op_type == "GroupQueryAttention" and _queries(n) != 1]
    if not found:
        return 0
    blocks = _Blocks(model.graph, found[0], block)
    for node in found:
        blocks.rewrite(node)
    return len(found)


def _queries(attention: ir.Node) -> Any:
    query = attention.inputs[0]
    assert query is not None and query.shape is not None
    return query.shape[1]


class _Nodes:
    """Appends operators to a list of nodes, each with a name of its own."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.nodes = prefix, list[ir.Node]()

    def __call__(self, op: str, *inputs: ir.Value | None, outputs: int = 1, domain: str = "", **attributes: Any) -> Any:
        """The operator's output, or outputs as a tuple."""
        name = f"{self.prefix}/{op}_{len(self.nodes)}"
        node = ir.node(op, list(inputs), attributes or None, domain=domain, num_outputs=outputs, name=name)
        for i, value in enumerate(node.outputs):
            value.name = f"{name}_output_{i}"
        self.nodes.append(node)
        return node.outputs[0] if outputs == 1 else tuple(node.outputs)


class _Blocks:
    """What all layers share, computed once: the length of a block and the number of blocks."""

    def __init__(self, graph: ir.Graph, first: ir.Node, block: int) -> None:
        self._graph = graph
        seqlens, total = first.inputs[5], first.inputs[6]
        emit = _Nodes("/attention_blocks")
        ids = graph.inputs[0]
        self._constants: dict[str, ir.Value] = {}
        self.one = self._constant([1])
        self.length = emit("Shape", ids, start=1, end=2)
        single = emit("Equal", emit("Shape", ids, start=0, end=1), self.one)
        ends = emit("Add", emit("Cast", emit("ReduceMin", seqlens, keepdims=0), to=int(ir.DataType.INT64)), self.one)
        unpadded = emit("Equal", ends, emit("Cast", total, to=int(ir.DataType.INT64)))
        size = emit("Where", emit("And", single, unpadded), self._constant([block]), self.length)
        self.size = emit("Max", size, self.one)
        rounded = emit("Sub", emit("Add", self.length, self.size), self.one)
        self.count = emit("Squeeze", emit("Div", rounded, self.size))
        self.always = self._constant(True)
        graph.insert_before(first, emit.nodes)

    def _constant(self, value: Any) -> ir.Value:
        if (constant := self._constants.get(repr(value))) is None:
            tensor = ir.tensor(value, dtype=ir.DataType.BOOL if value is True else ir.DataType.INT64)
            name = f"attention_blocks_constant_{len(self._constants)}"
            shape = ir.Shape([len(value)] if isinstance(value, list) else [])
            constant = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
            self._graph.register_initializer(constant)
            self._constants[repr(value)] = constant
        return constant

    def rewrite(self, attention: ir.Node) -> None:
        emit = _Nodes(str(attention.name))
        query, past, shape = attention.inputs[0], attention.inputs[3:5], attention.outputs[0].shape
        assert shape is not None
        none = emit("Slice", query, self._constant([0, 0]), self._constant([0, shape[2]]), self._constant([1, 2]))
        key, value, out = emit("Loop", self.count, self.always, *past, none, outputs=3, body=self._body(attention))
        self._graph.insert_before(attention, emit.nodes)
        for old, new in zip(attention.outputs, (out, key, value), strict=True):
            new.type, new.shape = old.type, old.shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
            old.name, new.name = None, old.name
        self._graph.remove(attention, safe=True)

    def _body(self, attention: ir.Node) -> ir.Graph:
        """(block, go on, past key, past value, out) -> (go on, key, value, longer out)."""
        past_key, past_value, seqlens, total, *tables = attention.inputs[3:]
        prefix = f"{attention.name}/block"
        emit = _Nodes(prefix)

        def state(name: str, like: ir.Value | None, dtype: ir.DataType | None = None) -> ir.Value:
            kind = like.type if like is not None else ir.TensorType(dtype or ir.DataType.INT64)
            return ir.Value(name=f"{prefix}/{name}", type=kind, shape=None if like is not None else ir.Shape([]))

        number, go_on = state("number", None), state("go_on", None, ir.DataType.BOOL)
        keys, values, done = (
            state("past_key", past_key),
            state("past_value", past_value),
            state("done", attention.outputs[0]),
        )
        begin = emit("Mul", number, self.size)
        end = emit("Min", emit("Add", begin, self.size), self.length)
        rows = [t and emit("Slice", t, begin, end, self.one) for t in attention.inputs[:3]]
        left = emit("Cast", emit("Sub", self.length, end), to=int(ir.DataType.INT32))
        seen = emit("Sub", seqlens, left)
        known = emit("Sub", total, emit("Squeeze", left))
        attributes = {name: attribute.value for name, attribute in attention.attributes.items()}

        def attend(*inputs: ir.Value | None) -> Any:
            return emit("GroupQueryAttention", *rows, *inputs, outputs=3, domain=CONTRIB, **attributes)

        if (window := int(attributes.get("local_window_size", -1))) > 0:
            count, last = emit("Sub", end, begin), emit("Cast", seen, to=int(ir.DataType.INT64))
            first = emit("Add", emit("Sub", last, count), self.one)  # position of each row's first query
            low = self._lowest(emit, first, window)
            far, near = self._split(emit, (keys, values), low)
            hidden = emit("Cast", low, to=int(ir.DataType.INT32))
            shifted = emit("Sub", seen, hidden), emit("Sub", known, emit("Squeeze", hidden))
            columns = emit("Range", self._constant(0), emit("Squeeze", count), self._constant(1))
            positions = [emit("Add", emit("Unsqueeze", first, self.one), columns)] if tables else []
            out, *nearer = attend(*near, *shifted, *tables, *positions)
            new_key, new_value = (emit("Concat", *parts, axis=2) for parts in zip(far, nearer, strict=True))
        else:
            out, new_key, new_value = attend(keys, values, seen, known, *tables)
        longer = emit("Concat", done, out, axis=1)
        still = emit("Identity", go_on)
        return ir.Graph(
            [number, go_on, keys, values, done], [still, new_key, new_value, longer], nodes=emit.nodes, name="block"
        )

    def _lowest(self, emit: _Nodes, first: ir.Value, window: int) -> ir.Value:
        """The lowest slot [1] that a block reads whose first queries are at positions `first` [B]."""
        earliest = emit("ReduceMin", first, keepdims=1)
        lowest: ir.Value = emit("Max", emit("Sub", earliest, self._constant([window - 1])), self._constant([0]))
        return lowest

    def _split(self, emit: _Nodes, cache: Sequence[ir.Value], slot: ir.Value) -> tuple[list[ir.Value], list[ir.Value]]:
        """The cache before a slot and from it on."""
        axis = self._constant([2])
        return (
            [emit("Slice", t, self._constant([0]), slot, axis) for t in cache],
            [emit("Slice", t, slot, self._constant([2**62]), axis) for t in cache],
        )
