"""Attention of several tokens, over a cache that may have room behind its tokens.

GroupQueryAttention appends new keys and values to the cache and attends to it, and copies nothing where past and
present are one buffer. A long prompt has a better way (attention_blocks.py), and projected entries have none:

    out, present = GroupQueryAttention(q, k, v, Concat(past, projected))          the boundary token, or a tail
    =>  cache = Concat(past[:before], projected, past[after:])
        If there is one row, or one token a row: GroupQueryAttention(q, k, v, cache)
        else: Scan over rows: GroupQueryAttention(q[row], k[row], v[row], cache[row]), each with its own end

`past[after:]` is the room that a buffer has behind its tokens, and keeps. The rows of a batch end apart, so their tails
follow pasts of unequal lengths, which the operator takes for one token a row only.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir

from .attention_blocks import choose_blocks, has_window
from .attention_graph import Emitter, Shared, choose, like, rewrite


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
    shared = Shared(graph, block or 0, {has_window(attention) for attention in found}, tails)
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
                outputs = like(emit, attention, *inputs)
        else:
            outputs = choose_blocks(shared, attention, emit)
        rewrite(graph, [attention, *appended], emit, outputs)
    for append in unread:
        emit = shared.emitter(str(append.name))
        rewrite(graph, [append], emit, [shared.write(emit, *append.inputs[:2])])
    return True


def _appended(attention: ir.Node) -> list[ir.Node]:
    """The two Concat that append projected keys and values to the cache, where attention reads them as its past."""
    made = [past.producer() for past in attention.inputs[3:5] if past is not None]
    return [node for node in made if node is not None]


def _is_tail(attention: ir.Node) -> bool:
    """Whether it is of several tokens at the end of each row, over projected keys and values."""
    shape = attention.outputs[0].shape
    return bool(_appended(attention)) and (shape is None or shape[1] != 1)


def _attend_to_tails(
    shared: Shared, attention: ir.Node, emit: Emitter, inputs: Sequence[ir.Value | None]
) -> Sequence[ir.Value]:
    """Attention of the last tokens of each row, whose cache `inputs` have: output, present key, present value."""
    together, apart = (shared.emitter(f"{attention.name}/{name}") for name in ("one_row", "several_rows"))
    return choose(
        emit, attention, shared.one_row,
        (together, like(together, attention, *inputs)), (apart, _attend_by_row(shared, attention, apart, inputs)),
    )  # fmt: skip


def _attend_by_row(
    shared: Shared, attention: ir.Node, emit: Emitter, inputs: Sequence[ir.Value | None]
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
    made = like(body, attention, *map(of_row, queries), *map(of_row, caches), of_row(seqlens), *others)
    outputs = [body("Squeeze", value, [0]) for value in made]
    for value, old in zip(outputs, attention.outputs, strict=True):
        value.type, value.shape = old.type, ir.Shape(old.shape[1:]) if old.shape is not None else None
    graph = ir.Graph(rows, outputs, nodes=body.nodes, name="row")
    stacked: Sequence[ir.Value] = emit("Scan", *scanned, outputs=3, body=graph, num_scan_inputs=len(scanned))
    return stacked
