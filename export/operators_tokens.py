"""How our operators of positions, boundary tokens and tails (passes/ops.py) are written in ONNX."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
import torch
from torch import fx

from popcompile.passes import ops
from popcompile.passes.graph import shape_of, tokens_of

from .rules import Rules, counted, dtype_of
from .writer import Writer

RULES = Rules()
rule = RULES.of


def _valid(w: Writer, mask: fx.Node) -> ir.Value:
    """How many tokens of each row count, [B]."""
    return w.kept(
        ("valid", mask),
        lambda: w("ReduceSum", w.cast(w[mask], torch.int64), w.constant([1]), keepdims=0),
    )


def _last_valid(w: Writer, mask: fx.Node) -> ir.Value:
    """Position of each row's last token, [B]."""
    return w.kept(("last valid", mask), lambda: w("Sub", _valid(w, mask), w.constant(1)))


def _past(w: Writer, mask: fx.Node, tokens: fx.Node) -> ir.Value:
    """Tokens before the new ones where no row is padded, [1]."""
    return w.kept(("past", mask, tokens), lambda: w("Sub", w.dimension(mask, 1), w.dimension(tokens, 1)))


def _past_length(w: Writer, mask: fx.Node, tokens: fx.Node) -> ir.Value:
    """Of each row, [B]."""
    return w.kept(("past length", mask, tokens), lambda: w("Min", _last_valid(w, mask), _past(w, mask, tokens)))


def _tail_tokens(w: Writer, tokens: fx.Node, window: int) -> ir.Value:
    """min(window, S), [1]."""
    return w.kept(("tail", tokens, window), lambda: w("Min", w.dimension(tokens, 1), w.constant([window])))


@rule(ops.token_positions)
def _token_positions(w: Writer, node: fx.Node) -> Any:
    mask, tokens = node.args
    past, new = _past_length(w, mask, tokens), counted(w, w.dimension(tokens, 1))
    return w("Add", w("Unsqueeze", past, w.constant([1])), w("Unsqueeze", new, w.constant([0])))


@rule(ops.rope_positions)
def _rope_positions(w: Writer, node: fx.Node) -> Any:
    return w("Transpose", w[node.args[0]], perm=[1, 2, 0])


@rule(ops.rotary_rows)
def _rotary_rows(w: Writer, node: fx.Node) -> Any:
    positions, axes = node.args
    rows = w("Gather", w[positions], w.constant(list(axes)), axis=2)
    return w("Reshape", rows, w.constant([-1, len(axes)]))


@rule(ops.token_rows)
def _token_rows(w: Writer, node: fx.Node) -> Any:
    """By two ranges that go no further than rows and tokens do, as a package's check asks of all."""
    batch, count = (w.dimension(node.args[0], axis) for axis in range(2))
    count = w("Min", count, w.dimension(tokens_of(node.graph.owning_module), 1))  # of a tail, whose size is computed
    before = w("Mul", w("Unsqueeze", counted(w, batch), w.constant([1])), count)
    return w("Add", before, w("Unsqueeze", counted(w, count), w.constant([0])))


@rule(ops.last_position)
def _last_position(w: Writer, node: fx.Node) -> Any:
    mask, tokens = node.args
    return w("Add", _past_length(w, mask, tokens), w("Sub", w.dimension(tokens, 1), w.constant(1)))


@rule(ops.boundary_position)
def _boundary_position(w: Writer, node: fx.Node) -> Any:
    return _last_valid(w, node.args[0])


def _index(w: Writer, mask: fx.Node, tokens: fx.Node) -> ir.Value:
    """Of each row's boundary token among the new ones, [B]."""
    return w.kept(
        ("boundary", mask, tokens),
        lambda: w("Max", w("Sub", _last_valid(w, mask), _past(w, mask, tokens)), w.constant(0)),
    )


@rule(ops.boundary_index)
def _boundary_index(w: Writer, node: fx.Node) -> Any:
    return _index(w, *node.args)


def _start(w: Writer, mask: fx.Node, tokens: fx.Node, window: int) -> ir.Value:
    """Of each row's tail among the new tokens, [B]."""

    def written() -> ir.Value:
        before = w("Sub", _tail_tokens(w, tokens, window), w.constant(1))
        start: ir.Value = w("Max", w("Sub", _index(w, mask, tokens), before), w.constant(0))
        return start

    return w.kept(("start", mask, tokens, window), written)


@rule(ops.tail_start)
def _tail_start(w: Writer, node: fx.Node) -> Any:
    return _start(w, *node.args)


@rule(ops.tail_end)
def _tail_end(w: Writer, node: fx.Node) -> Any:
    mask, tokens, window = node.args
    behind = w("Sub", _tail_tokens(w, tokens, window), w.constant(1))
    return w("Add", w("Add", _past_length(w, mask, tokens), _start(w, mask, tokens, window)), behind)


def _rows(w: Writer, start: ir.Value, count: ir.Value | None, x: fx.Node) -> ir.Value:
    """start, start + 1, ... for every feature of x: [B, count, ...]. count None: 1."""
    rank, features = len(shape_of(x)), list(shape_of(x)[2:])
    indices = w("Unsqueeze", start, w.constant([1]))
    if count is not None:
        indices = w("Add", indices, w("Unsqueeze", counted(w, count), w.constant([0])))
    if rank == 2:
        return indices
    indices = w("Unsqueeze", indices, w.constant(list(range(2, rank))))
    return w("Expand", indices, w.constant([1, 1, *features]))


@rule(ops.select_boundary)
def _select_boundary(w: Writer, node: fx.Node) -> Any:
    x, index = node.args
    rows = w.kept(("row", index, shape_of(x)[2:]), lambda: _rows(w, w[index], None, x))
    return w("GatherElements", w[x], rows, axis=1)


@rule(ops.select_tail)
def _select_tail(w: Writer, node: fx.Node) -> Any:
    x, start, window = node.args
    return w("GatherElements", w[x], _tail_rows(w, x, start, window), axis=1)


@rule(ops.insert_tail)
def _insert_tail(w: Writer, node: fx.Node) -> Any:
    x, tail, start = node.args
    assert start.target == ops.tail_start
    return w("ScatterElements", w[x], _tail_rows(w, x, start, start.args[2]), w[tail], axis=1)


def _tail_rows(w: Writer, x: fx.Node, start: fx.Node, window: int) -> ir.Value:
    features = shape_of(x)[2:]
    return w.kept(("rows", start, window, features), lambda: _rows(w, w[start], _tail_tokens(w, x, window), x))


@rule(ops.insert_boundary)
def _insert_boundary(w: Writer, node: fx.Node) -> Any:
    x, boundary, index = node.args
    places = w("Unsqueeze", counted(w, w.dimension(x, 1)), w.constant([0]))
    found = w("Equal", places, w("Unsqueeze", w[index], w.constant([1])), dtype=torch.bool)
    for axis in range(2, len(shape_of(x))):
        found = w("Unsqueeze", found, w.constant([axis]))
    return w("Where", found, w[boundary], w[x], dtype=dtype_of(node))


@rule(ops.replace_sink)
def _replace_sink(w: Writer, node: fx.Node) -> Any:
    x, sink, positions = node.args
    first = w.kept(
        ("first", positions),
        lambda: w("Unsqueeze", w("Equal", w[positions], w.constant(0), dtype=torch.bool), w.constant([-1])),
    )
    return w("Where", first, w[sink], w[x], dtype=dtype_of(node))


def _columns(w: Writer, x: ir.Value, start: int, end: int) -> ir.Value:
    """x[:, start:end]."""
    part: ir.Value = w("Slice", x, w.constant([start]), w.constant([end]), w.constant([1]))
    part.shape = None
    return part


@rule(ops.image_ends)
def _image_ends(w: Writer, node: fx.Node) -> Any:
    """Images in their order: those before a token are counted, and the last token of each is looked up."""
    is_image, positions = (w[argument] for argument in node.args[:2])
    limit = w("Unsqueeze", _valid(w, node.args[2]), w.constant([1]))
    image = w("And", is_image, w("Less", positions, limit, dtype=torch.bool))
    none = w("Expand", w.constant(False, torch.bool), w("Concat", w.dimension(node, 0), w.constant([1]), axis=0))
    before = w("Concat", none, _columns(w, image, 0, -1), axis=1)
    behind = w("Concat", _columns(w, image, 1, 2**62), none, axis=1)
    first, last = (w("And", image, w("Not", beside)) for beside in (before, behind))
    counted = w("CumSum", w("Reshape", w.cast(first, torch.int64), w.constant([-1])), w.constant(0))
    number = w("Sub", w("Reshape", counted, w.sizes_of(positions)), w.constant(1))
    ends = w("GatherND", positions, w("Transpose", w("NonZero", last, dtype=torch.int64), perm=[1, 0]))
    ends = w("Concat", ends, w.constant([0]), axis=0)  # for text before the first image, whose number is -1
    return w("Where", image, w("Gather", ends, number), positions, dtype=torch.int64)
