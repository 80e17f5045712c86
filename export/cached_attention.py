"""Attention of several tokens: in blocks, over a cache that may have room behind its tokens.

GroupQueryAttention appends new keys and values to the cache and attends to it, and copies nothing where past and
present are one buffer. A long prompt has better ways:

    out, present = GroupQueryAttention(q, k, v, past)
    =>  If there is one block: the same
        else: cache = past[:before]
              for blocks [begin, end) of tokens:
                  out, cache = GroupQueryAttention(q[begin:end], k[begin:end], v[begin:end], cache)
              present = Concat(cache, past[after:])

On the CPU the operator computes more than the triangle that a prompt needs: the whole square, or with its flash kernel
up to tiles that grow with the CPU's cache. Blocks over growing prefixes compute little more than the triangle. Each
copies the prefix before it, so blocks of long prompts are longer: there are at most 32. With a sliding window the cache
is written first, and a block is given no keys but its window's of the cache, and no new ones, which the operator takes
since ONNX Runtime 1.27. The operator takes several tokens after a past for one row only, so a batch is one block.

    out, present = GroupQueryAttention(q, k, v, Concat(past, projected))          the boundary token, or a tail
    =>  cache = Concat(past[:before], projected, past[after:])
        If there is one row, or one token a row: GroupQueryAttention(q, k, v, cache)
        else: Scan over rows: GroupQueryAttention(q[row], k[row], v[row], cache[row]), each with its own end

`past[after:]` is the room that a buffer has behind its tokens, and keeps. The rows of a batch end apart, so their tails
follow pasts of unequal lengths, which the operator takes for one token a row only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import onnx_ir as ir

from popcompile.passes.onnx_ops import CONTRIB

from .inputs import mask_input, tokens_input

_END = 2**62  # of a Slice: as far as there is something
#: blocks of a prompt that is cut into longer ones than it has to be, at least
_FEWEST = 16
_INT32, _INT64 = int(ir.DataType.INT32), int(ir.DataType.INT64)


def attend_to_prompts(model: ir.Model, block: int | None) -> bool:
    """Rewrite the attention of a graph for several tokens, in place; returns whether anything had to be.

    block: queries that attention of a prompt takes at a time, at least; None leaves it to the operator. Entries that no
    attention reads are written as well.
    """
    graph = model.graph
    found = [n for n in graph if n.op_type == "GroupQueryAttention" and (block or _appended(n))]
    unread = [n for value in graph.outputs if (n := value.producer()) and n.op_type == "Concat"]
    if not found and not unread:
        return False
    tails = any(_is_tail(attention) for attention in found)
    shared = _Shared(graph, block or 0, {_has_window(attention) for attention in found}, tails)
    for attention in found:
        emit = shared.emitter(str(attention.name))
        if appended := _appended(attention):
            cache = [shared.write(emit, *node.inputs[:2]) for node in appended]
            for value, present in zip(cache, attention.outputs[1:], strict=True):
                value.type, value.shape = present.type, present.shape
            inputs = [*attention.inputs[:3], *cache, *attention.inputs[5:]]
            if _is_tail(attention):
                outputs = _attend_to_tails(shared, attention, emit, inputs)
            else:
                outputs = _like(emit, attention, *inputs)
        else:
            outputs = _choose_blocks(shared, attention, emit)
        _rewrite(graph, [attention, *appended], emit, outputs)
    for append in unread:
        emit = shared.emitter(str(append.name))
        _rewrite(graph, [append], emit, [shared.write(emit, *append.inputs[:2])])
    return True


def _has_window(attention: ir.Node) -> bool:
    return "local_window_size" in attention.attributes


def _appended(attention: ir.Node) -> list[ir.Node]:
    """The two Concat that append projected keys and values to the cache, where attention reads them as its past."""
    made = [past.producer() for past in attention.inputs[3:5] if past is not None]
    return [node for node in made if node is not None]


def _is_tail(attention: ir.Node) -> bool:
    """Whether it is of several tokens at the end of each row, over projected keys and values."""
    shape = attention.outputs[0].shape
    return bool(_appended(attention)) and (shape is None or shape[1] != 1)


class _Emitter:
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


class _Cut(NamedTuple):
    """How a prompt is split into blocks.

    size: queries per full block, int64 [1]. whole: number of full blocks before the last one, which may be shorter,
    int64 scalar. last: first query of the last block, int64 [1].
    """

    size: ir.Value
    whole: ir.Value
    last: ir.Value


class _Shared:
    """What all layers need, computed once.

    batch, tokens, before, after: B, S, T - S and T, [1] each. cuts: for attention with a window, and without.
    single: whether there is one block. one_row: whether there is one row.
    """

    def __init__(self, graph: ir.Graph, block: int, windows: set[bool], tails: bool = False) -> None:
        self.graph = graph
        self._constants: dict[str, ir.Value] = {}
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

    def _cut(self, emit: _Emitter, block: int, window: bool) -> _Cut:
        size: Any = [block]
        if not window:
            size = emit("Mul", emit("Max", emit("Div", self.tokens, [_FEWEST * block]), [1]), size)
        size = emit("Where", emit("Equal", self.batch, [1]), size, self.tokens)
        whole = emit("Div", emit("Sub", self.tokens, [1]), size)
        return _Cut(size, emit("Squeeze", whole), emit("Mul", whole, size))

    def emitter(self, prefix: str) -> _Emitter:
        return _Emitter(prefix, self._constant)

    def _constant(self, value: Any) -> ir.Value:
        if (constant := self._constants.get(repr(value))) is None:
            tensor = ir.tensor(value, dtype=ir.DataType.BOOL if isinstance(value, bool) else ir.DataType.INT64)
            shape = ir.Shape([len(value)] if isinstance(value, list) else [])
            name = f"attention_constant_{len(self._constants)}"
            constant = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=shape, const_value=tensor)
            self.graph.register_initializer(constant)
            self._constants[repr(value)] = constant
        return constant

    def write(self, emit: _Emitter, past: ir.Value | None, new: ir.Value | None) -> ir.Value:
        """A cache with new entries [B, kv heads, S, head size] at slots [before, after)."""
        kept = emit("Slice", past, [0], self.before, [2])
        room = emit("Slice", past, self.after, [_END], [2])
        present: ir.Value = emit("Concat", kept, new, room, axis=2)
        return present


def _rewrite(graph: ir.Graph, nodes: Sequence[ir.Node], emit: _Emitter, outputs: Sequence[ir.Value]) -> None:
    """Put what was emitted in the place of nodes, whose first one's outputs are now `outputs`, under their names."""
    first = nodes[0]
    graph.insert_before(first, emit.nodes)
    for old, new in zip(first.outputs, outputs, strict=True):
        new.type, new.shape = old.type, old.shape
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        old.name, new.name = None, old.name
    graph.remove(nodes, safe=True)


_Branch = tuple[_Emitter, Sequence[ir.Value]]


def _choose(
    emit: _Emitter, attention: ir.Node, condition: ir.Value, then_branch: _Branch, else_branch: _Branch
) -> Sequence[ir.Value]:
    """One of two branches, each an emitter and what it made in place of the attention's outputs."""
    branches: dict[str, Any] = {}
    for key, (into, outputs) in (("then_branch", then_branch), ("else_branch", else_branch)):
        for value, old in zip(outputs, attention.outputs, strict=True):
            value.type, value.shape = old.type, old.shape
        branches[key] = ir.Graph([], outputs, nodes=into.nodes, name=into.prefix.rsplit("/", 1)[1])
    chosen: Sequence[ir.Value] = emit("If", condition, outputs=3, **branches)
    return chosen


def _like(emit: _Emitter, attention: ir.Node, *inputs: ir.Value | None) -> Any:
    """The same operator with other inputs: output, present key, present value."""
    attributes = {name: attribute.value for name, attribute in attention.attributes.items()}
    return emit(attention.op_type, *inputs, outputs=3, domain=attention.domain, **attributes)


def _width(value: ir.Value | None, dimension: int) -> int:
    """A dimension that is a number."""
    assert value is not None and value.shape is not None
    width = value.shape[dimension]
    assert isinstance(width, int)
    return width


# --- tails ----------------------------------------------------------------------------------------------------


def _attend_to_tails(
    shared: _Shared, attention: ir.Node, emit: _Emitter, inputs: Sequence[ir.Value | None]
) -> Sequence[ir.Value]:
    """Attention of the last tokens of each row, whose cache `inputs` have: output, present key, present value."""
    together, apart = (shared.emitter(f"{attention.name}/{name}") for name in ("one_row", "several_rows"))
    return _choose(
        emit, attention, shared.one_row,
        (together, _like(together, attention, *inputs)), (apart, _attend_by_row(shared, attention, apart, inputs)),
    )  # fmt: skip


def _attend_by_row(
    shared: _Shared, attention: ir.Node, emit: _Emitter, inputs: Sequence[ir.Value | None]
) -> Sequence[ir.Value]:
    """Attention of one row after another."""
    body = shared.emitter(f"{attention.name}/row")
    scanned: list[ir.Value] = []
    rows: list[ir.Value] = []

    def of_row(value: ir.Value | None) -> ir.Value | None:
        """A row's part [1, ...] of a value [B, ...], which Scan hands over as [...]."""
        if value is None:
            return None
        assert value.shape is not None
        shape = ir.Shape(value.shape[1:])
        part = ir.Value(name=f"{body.prefix}/row_{len(rows)}", type=value.type, shape=shape)
        scanned.append(value)
        rows.append(part)
        row: ir.Value = body("Unsqueeze", part, [0])
        row.type, row.shape = value.type, ir.Shape([1, *shape])
        return row

    # the total is that of all rows: a row's own is on the device, and the operator counts by seqlens_k
    queries, caches, (seqlens, *others) = inputs[:3], inputs[3:5], inputs[5:]
    made = _like(body, attention, *map(of_row, queries), *map(of_row, caches), of_row(seqlens), *others)
    outputs = [body("Squeeze", value, [0]) for value in made]
    for value, old in zip(outputs, attention.outputs, strict=True):
        value.type, value.shape = old.type, ir.Shape(old.shape[1:]) if old.shape is not None else None
    graph = ir.Graph(rows, outputs, nodes=body.nodes, name="row")
    stacked: Sequence[ir.Value] = emit("Scan", *scanned, outputs=3, body=graph, num_scan_inputs=len(scanned))
    return stacked


# --- blocks ---------------------------------------------------------------------------------------------------


def _choose_blocks(shared: _Shared, attention: ir.Node, emit: _Emitter) -> Sequence[ir.Value]:
    """Attention in one block or in several: output, present key, present value.

    What blocks hand on goes with the branch; Loops in the graph itself held 60 MB more of SmolLM2 at 2,048 tokens.
    """
    one, several = (shared.emitter(f"{attention.name}/{name}") for name in ("one_block", "several_blocks"))
    return _choose(
        emit, attention, shared.single,
        (one, _like(one, attention, *attention.inputs)), (several, _attend_in_blocks(shared, attention, several)),
    )  # fmt: skip


def _attend_in_blocks(shared: _Shared, attention: ir.Node, emit: _Emitter) -> Sequence[ir.Value]:
    """Attention of several tokens: output, present key, present value."""
    window = _has_window(attention)
    blocks, cut = (_WindowBlocks if window else _Blocks)(shared, attention, emit), shared.cuts[window]
    width = _width(attention.outputs[0], 2)
    *cache, whole = emit(
        "Loop", cut.whole, True, *blocks.carried, outputs=len(blocks.carried) + 1, body=blocks.body(cut.size)
    )
    done = emit("Reshape", whole, emit("Concat", shared.batch, cut.last, [width], axis=0), allowzero=1)
    last, *cache = blocks.attend(emit, cut.last, shared.tokens, cache)
    return emit("Concat", done, last, axis=1), *blocks.present(emit, cache)


class _Blocks:
    """Blocks of queries, each appending its keys and values to those of the blocks before it.

    carried: what a block takes over from the one before it: keys and values [B, kv heads, tokens so far, head size].
    """

    def __init__(self, shared: _Shared, attention: ir.Node, emit: _Emitter) -> None:
        self.shared, self.attention = shared, attention
        self.rows, self.past = attention.inputs[:3], attention.inputs[3:5]
        self.seqlens, self.total, *self.others = attention.inputs[5:]
        self.tables = [table for table in self.others[:2] if table is not None]
        self.carried = self.begin(emit)

    def begin(self, emit: _Emitter) -> list[ir.Value]:
        """The loop-carried values before the first block."""
        return [emit("Slice", past, [0], self.shared.before, [2]) for past in self.past]

    def present(self, emit: _Emitter, cache: Sequence[ir.Value]) -> list[ir.Value]:
        """present_key and present_value of all tokens, from the loop-carried values after the last block."""
        return [
            emit("Concat", written, emit("Slice", past, self.shared.after, [_END], [2]), axis=2)
            for written, past in zip(cache, self.past, strict=True)
        ]

    def body(self, size: ir.Value) -> ir.Graph:
        """The body of a Loop over full blocks: (block, cond, *carried) -> (cond, *carried, output [B, size, width])."""
        emit = self.shared.emitter(f"{self.attention.name}/block")

        def state(name: str, dtype: ir.DataType | None, sizes: Sequence[int | None]) -> ir.Value:
            assert dtype is not None
            return ir.Value(name=f"{emit.prefix}/{name}", type=ir.TensorType(dtype), shape=ir.Shape(sizes))

        number, go_on = state("number", ir.DataType.INT64, []), state("go_on", ir.DataType.BOOL, [])
        output, *_ = self.attention.outputs
        sizes = [None, _width(self.past[0], 1), None, _width(self.past[0], 3)]
        cache = [state(f"past_{i}", output.dtype, sizes) for i, _ in enumerate(self.carried)]
        begin = emit("Mul", number, size)
        out, *longer = self.attend(emit, begin, emit("Add", begin, size), cache)
        out.type, out.shape = output.type, ir.Shape([None, None, _width(output, 2)])
        for new, old in zip(longer, cache, strict=True):
            new.type, new.shape = old.type, old.shape
        outputs = [emit("Identity", go_on), *longer, out]
        return ir.Graph([number, go_on, *cache], outputs, nodes=emit.nodes, name="block")

    def attend(self, emit: _Emitter, begin: ir.Value, end: ir.Value, cache: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """Attention of queries [begin, end), int64 [1] each: (output, loop-carried values for the next block)."""
        rows = [t and self.sliced(emit, t, begin, end) for t in self.rows]
        seqlens, total = self.counted(emit, end)
        return self._attention(emit, *rows, *cache, seqlens, total, *self.others)

    def sliced(self, emit: _Emitter, rows: ir.Value, begin: ir.Value, end: ir.Value) -> ir.Value:
        """Rows [begin, end), with a width that the operator's shape inference asks for (ONNX Runtime 1.30)."""
        block: ir.Value = emit("Slice", rows, begin, end, [1])
        block.type, block.shape = self.attention.outputs[0].type, ir.Shape([None, None, _width(rows, 2)])
        return block

    def counted(self, emit: _Emitter, end: ir.Value) -> tuple[ir.Value, ir.Value]:
        """seqlens_k and total_sequence_length where the tokens from `end` on are not there yet."""
        left = emit("Cast", emit("Sub", self.shared.tokens, end), to=_INT32)
        return emit("Sub", self.seqlens, left), emit("Sub", self.total, emit("Squeeze", left))

    def _attention(self, emit: _Emitter, *inputs: ir.Value | None) -> Sequence[ir.Value]:
        outputs: Sequence[ir.Value] = _like(emit, self.attention, *inputs)
        return outputs


class _WindowBlocks(_Blocks):
    """With a sliding window: the cache is written at once, and a block reads its window's part of it."""

    def begin(self, emit: _Emitter) -> list[ir.Value]:
        query, key, value = self.rows
        heads, kv_heads = (self.attention.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
        width = _width(self.attention.outputs[0], 2)
        head_size = width // heads
        if key is None:  # packed
            parts = [width, kv_heads * head_size, kv_heads * head_size]
            query, key, value = emit("Split", query, parts, outputs=3, axis=2)
            query.type, query.shape = self.attention.outputs[0].type, ir.Shape([None, None, width])
        nothing = emit("Slice", key, [0], [0], [1])
        if self.tables:
            rotated = 2 * _width(self.tables[0], 1)
            sizes = {"num_heads": kv_heads, "rotary_embedding_dim": rotated if rotated < head_size else 0}
            key = emit("RotaryEmbedding", key, self.shared.before, *self.tables, domain=CONTRIB, **sizes)
        self.written = []
        for past, new in zip(self.past, (key, value), strict=True):
            split = emit("Reshape", new, [0, 0, kv_heads, head_size])
            self.written.append(self.shared.write(emit, past, emit("Transpose", split, perm=[0, 2, 1, 3])))
        self.rows = (query, nothing, nothing)
        return []

    def present(self, emit: _Emitter, cache: Sequence[ir.Value]) -> list[ir.Value]:
        return self.written

    def attend(self, emit: _Emitter, begin: ir.Value, end: ir.Value, cache: Sequence[ir.Value]) -> Sequence[ir.Value]:
        query, *nothing = self.rows
        assert query is not None
        rows = self.sliced(emit, query, begin, end)
        seqlens, total = self.counted(emit, end)
        count = emit("Sub", end, begin)
        # position of each row's first query
        first = emit("Add", emit("Sub", emit("Cast", seqlens, to=_INT64), count), [1])
        window = self.attention.attributes["local_window_size"].as_int()
        low = emit("Max", emit("Sub", emit("ReduceMin", first, keepdims=1), [window - 1]), [0])
        near = [emit("Slice", t, low, emit("Add", self.shared.before, end), [2]) for t in self.written]
        hidden = emit("Cast", low, to=_INT32)
        seqlens, total = emit("Sub", seqlens, hidden), emit("Sub", total, emit("Squeeze", hidden))
        columns = emit("Range", 0, emit("Squeeze", count), 1)
        others = self.others
        if self.tables:
            others = [*self.tables, emit("Add", emit("Unsqueeze", first, [1]), columns), *others[3:]]
        # the present outputs are not read: without them ONNX Runtime before 1.31 crashes
        return self._attention(emit, rows, *nothing, *near, seqlens, total, *others)[:1]
