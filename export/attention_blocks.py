"""Attention of a long prompt, in blocks of queries.

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
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from .attention_graph import END, Emitter, Shared, choose, like, rotate, width_of

_INT32, _INT64 = int(ir.DataType.INT32), int(ir.DataType.INT64)


def has_window(attention: ir.Node) -> bool:
    return "local_window_size" in attention.attributes


def choose_blocks(shared: Shared, attention: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """Attention in one block or in several: output, present key, present value.

    What blocks hand on goes with the branch; Loops in the graph itself held 60 MB more of SmolLM2 at 2,048 tokens.
    """
    one, several = (shared.emitter(f"{attention.name}/{name}") for name in ("one_block", "several_blocks"))
    return choose(
        emit, attention, shared.single,
        (one, like(one, attention, *attention.inputs)), (several, _attend_in_blocks(shared, attention, several)),
    )  # fmt: skip


def _attend_in_blocks(shared: Shared, attention: ir.Node, emit: Emitter) -> Sequence[ir.Value]:
    """Attention of several tokens: output, present key, present value."""
    window = has_window(attention)
    blocks, cut = (_WindowBlocks if window else _Blocks)(shared, attention, emit), shared.cuts[window]
    width = width_of(attention.outputs[0], 2)
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

    def __init__(self, shared: Shared, attention: ir.Node, emit: Emitter) -> None:
        self.shared, self.attention = shared, attention
        self.rows, self.past = attention.inputs[:3], attention.inputs[3:5]
        self.seqlens, self.total, *self.others = attention.inputs[5:]
        self.tables = [table for table in self.others[:2] if table is not None]
        self.carried = self.begin(emit)

    def begin(self, emit: Emitter) -> list[ir.Value]:
        """The loop-carried values before the first block."""
        return [emit("Slice", past, [0], self.shared.before, [2]) for past in self.past]

    def present(self, emit: Emitter, cache: Sequence[ir.Value]) -> list[ir.Value]:
        """present_key and present_value of all tokens, from the loop-carried values after the last block."""
        return [
            emit("Concat", written, emit("Slice", past, self.shared.after, [END], [2]), axis=2)
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
        sizes = [None, width_of(self.past[0], 1), None, width_of(self.past[0], 3)]
        cache = [state(f"past_{i}", output.dtype, sizes) for i, _ in enumerate(self.carried)]
        begin = emit("Mul", number, size)
        out, *longer = self.attend(emit, begin, emit("Add", begin, size), cache)
        out.type, out.shape = output.type, ir.Shape([None, None, width_of(output, 2)])
        for new, old in zip(longer, cache, strict=True):
            new.type, new.shape = old.type, old.shape
        outputs = [emit("Identity", go_on), *longer, out]
        return ir.Graph([number, go_on, *cache], outputs, nodes=emit.nodes, name="block")

    def attend(self, emit: Emitter, begin: ir.Value, end: ir.Value, cache: Sequence[ir.Value]) -> Sequence[ir.Value]:
        """Attention of queries [begin, end), int64 [1] each: (output, loop-carried values for the next block)."""
        rows = [t and self.sliced(emit, t, begin, end) for t in self.rows]
        seqlens, total = self.counted(emit, end)
        return self._attention(emit, *rows, *cache, seqlens, total, *self.others)

    def sliced(self, emit: Emitter, rows: ir.Value, begin: ir.Value, end: ir.Value) -> ir.Value:
        """Rows [begin, end), with a width that the operator's shape inference asks for (ONNX Runtime 1.30)."""
        block: ir.Value = emit("Slice", rows, begin, end, [1])
        block.type, block.shape = self.attention.outputs[0].type, ir.Shape([None, None, width_of(rows, 2)])
        return block

    def counted(self, emit: Emitter, end: ir.Value) -> tuple[ir.Value, ir.Value]:
        """seqlens_k and total_sequence_length where the tokens from `end` on are not there yet."""
        left = emit("Cast", emit("Sub", self.shared.tokens, end), to=_INT32)
        return emit("Sub", self.seqlens, left), emit("Sub", self.total, emit("Squeeze", left))

    def _attention(self, emit: Emitter, *inputs: ir.Value | None) -> Sequence[ir.Value]:
        outputs: Sequence[ir.Value] = like(emit, self.attention, *inputs)
        return outputs


class _WindowBlocks(_Blocks):
    """With a sliding window: the cache is written at once, and a block reads its window's part of it."""

    def begin(self, emit: Emitter) -> list[ir.Value]:
        query, key, value = self.rows
        heads, kv_heads = (self.attention.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
        width = width_of(self.attention.outputs[0], 2)
        head_size = width // heads
        if key is None:  # packed
            parts = [width, kv_heads * head_size, kv_heads * head_size]
            query, key, value = emit("Split", query, parts, outputs=3, axis=2)
            query.type, query.shape = self.attention.outputs[0].type, ir.Shape([None, None, width])
        nothing = emit("Slice", key, [0], [0], [1])
        if self.tables:
            key = rotate(emit, key, self.shared.before, self.tables, kv_heads, head_size)
        self.written = []
        for past, new in zip(self.past, (key, value), strict=True):
            split = emit("Reshape", new, [0, 0, kv_heads, head_size])
            self.written.append(self.shared.write(emit, past, emit("Transpose", split, perm=[0, 2, 1, 3])))
        self.rows = (query, nothing, nothing)
        return []

    def present(self, emit: Emitter, cache: Sequence[ir.Value]) -> list[ir.Value]:
        return self.written

    def attend(self, emit: Emitter, begin: ir.Value, end: ir.Value, cache: Sequence[ir.Value]) -> Sequence[ir.Value]:
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
