"""Attention of images' tokens that see all of their image: the rows of images are put into causal attention's output.

    ImageAttention(out, query, key, value, positions, ends)
    =>  rows = Loop over the images of all rows of the batch:
                   MultiHeadAttention(query[row, begin:end], key[row, low:stop], value[row, low:stop])
        ScatterND(out, tokens, rows)

key and value are the cache with the new tokens in it. An image is a run of tokens that see beyond themselves: its last
token does not, and is right already. `stop` is behind that one. `low` is 0, or where the sliding window of the first
query begins; those of the others are a bias, for which a provider's kernels may want more keys than there are, hidden
ones (Provider.key_multiple). A prompt without images runs nothing in the loop and scatters nothing, in
place, and a single token never sees beyond itself.

A head of MultiHeadAttention has keys of its own, so the heads that share some are folded into queries. Images come one
by one, from whichever row, so that rows may be of any lengths and images.
"""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from onnx_ir.passes.common import RemoveUnusedNodesPass

from popcompile.passes.onnx_ops import CONTRIB, IMAGE_ATTENTION

from .attention_graph import Emitter, Emitters, rewrite, rotate, width_of
from .inputs import mask_input

#: added to the scores of keys behind a window: no share of the softmax is left, in fp16 either
_HIDDEN = -30_000


def forget_images(model: ir.Model) -> None:
    """Leave out, in place, what a graph computes for images: for single tokens, which see nothing beyond themselves."""
    found = _image_attention(model.graph)
    for node in found:
        ir.convenience.replace_all_uses_with(node.outputs[0], _inputs(node)[0])
        model.graph.remove(node, safe=True)
    if found:
        RemoveUnusedNodesPass()(model)


def attend_to_images(model: ir.Model, key_multiple: int) -> bool:
    """Rewrite the attention of images of a graph for several tokens, in place; returns whether it has any.

    key_multiple: what divides the number of keys of attention with a bias.
    """
    found = _image_attention(model.graph)
    if not found:
        return False
    emitters = Emitters(model.graph, "image")
    first = emitters.emitter("/images")
    total = first("Shape", mask_input(model.graph), start=1, end=2)
    slots = first("Range", 0, first("Squeeze", first("Add", total, [key_multiple - 1])), 1)
    model.graph.insert_before(model.graph[0], first.nodes)
    sets: dict[tuple[ir.Value, ir.Value], _Images] = {}  # among all tokens, and among the tails
    for node in found:
        _, _, _, _, positions, ends, *_ = _inputs(node)
        key = (positions, ends)
        if key not in sets:
            shared = emitters.emitter(f"/images_{len(sets)}")
            sets[key] = _Images(shared, mask_input(model.graph), positions, ends)
            model.graph.insert_before(node, shared.nodes)
        emit = emitters.emitter(str(node.name))
        attention = _Attention(node, emitters, sets[key], slots, key_multiple)
        rewrite(model.graph, [node], emit, [attention.output(emit)])
    return True


def _image_attention(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if f"{node.domain}::{node.op_type}" == IMAGE_ATTENTION]


def _inputs(node: ir.Node) -> list[ir.Value]:
    """All of them: none is left out."""
    return [value for value in node.inputs if value is not None]


class _Images:
    """The images among tokens at positions [B, S], of which each sees the slots up to ends [B, S].

    tokens: row and index of each that sees beyond itself [n, 2]. places: of each image its row, the index of its first
    such token, their number, the first one's position, and the slot behind the image [images, 5]. count: of images,
    int64 scalar.
    """

    def __init__(self, emit: Emitter, mask: ir.Value, positions: ir.Value, ends: ir.Value) -> None:
        beyond = emit("Greater", ends, positions)
        row_ends = emit("And", emit("Slice", beyond, [0], [1], [1]), False)
        before = emit("Concat", row_ends, emit("Slice", beyond, [0], [-1], [1]), axis=1)
        self.tokens = _found(emit, beyond)
        starts = _found(emit, emit("And", beyond, emit("Not", before)))
        position, end = (emit("Unsqueeze", emit("GatherND", t, starts), [1]) for t in (positions, ends))
        self.places = emit("Concat", starts, emit("Sub", end, position), position, emit("Add", end, [1]), axis=1)
        images = emit("Squeeze", emit("Shape", starts, start=0, end=1))
        self.count = emit("Min", images, emit("Size", mask))  # no more than slots, as a package's check asks of a Loop


def _found(emit: Emitter, places: ir.Value) -> ir.Value:
    """Row and index of each true place [B, S], in order, [n, 2]."""
    indices: ir.Value = emit("Transpose", emit("NonZero", places), perm=[1, 0])
    return indices


class _Attention:
    """One layer's. slots: 0, 1, ..., as many as there are keys at most."""

    def __init__(self, node: ir.Node, emitters: Emitters, images: _Images, slots: ir.Value, key_multiple: int) -> None:
        self.node, self.emitters, self.images = node, emitters, images
        self.slots, self.key_multiple = slots, key_multiple
        self.out, self.query, key, value, self.positions, _, *self.tables = _inputs(node)
        self.cache = (key, value)
        self.heads, self.kv_heads = (node.attributes[name].as_int() for name in ("num_heads", "kv_num_heads"))
        self.window = node.attributes.get_int("local_window_size", 0)
        self.width = width_of(node.outputs[0], 2)
        self.head_size = self.width // self.heads
        dtype = node.outputs[0].dtype
        assert dtype is not None
        self.dtype = dtype

    def output(self, emit: Emitter) -> ir.Value:
        """The output [B, S, heads x head size], with the images' rows."""
        none = emit("Slice", emit("Reshape", self.out, [-1, self.width]), [0], [0], [0])
        rows = emit("Loop", self.images.count, True, none, body=self._body())
        made: ir.Value = emit("ScatterND", self.out, self.images.tokens, rows)
        return made

    def _body(self) -> ir.Graph:
        """The body of a Loop over images: (image, cond, rows before) -> (cond, those and the image's [n, width])."""
        emit = self.emitters.emitter(f"{self.node.name}/image")

        def state(name: str, dtype: ir.DataType, sizes: Sequence[int | None]) -> ir.Value:
            return ir.Value(name=f"{emit.prefix}/{name}", type=ir.TensorType(dtype), shape=ir.Shape(sizes))

        number, go_on = state("number", ir.DataType.INT64, []), state("go_on", ir.DataType.BOOL, [])
        before = state("before", self.dtype, [None, self.width])
        rows = emit("Concat", before, self._attend(emit, number), axis=0)
        rows.type, rows.shape = before.type, before.shape
        return ir.Graph([number, go_on, before], [emit("Identity", go_on), rows], nodes=emit.nodes, name="image")

    def _attend(self, emit: Emitter, number: ir.Value) -> ir.Value:
        """The rows [n, width] of the image of that number."""
        place = emit("Gather", self.images.places, number, axis=0)
        row, begin, count, position, stop = emit("Split", place, [1] * 5, outputs=5, axis=0)

        def of_row(x: ir.Value) -> ir.Value:
            """The image's row [1, ...] of x [B, ...]."""
            made: ir.Value = emit("Slice", x, row, emit("Add", row, [1]), [0])
            return made

        end = emit("Add", begin, count)
        query, positions = (of_row(emit("Slice", x, begin, end, [1])) for x in (self.query, self.positions))
        query.type, query.shape = self.node.outputs[0].type, ir.Shape([1, None, self.width])
        if self.tables:
            query = rotate(emit, query, positions, self.tables, self.heads, self.head_size)
        if self.window:
            slots = self._near(emit, position, stop)
            near = emit("Min", slots, emit("Sub", stop, [1]))
            keys = [of_row(emit("Gather", cached, near, axis=2)) for cached in self.cache]
            bias = self._bias(emit, positions, slots, stop)
        else:
            keys = [of_row(emit("Slice", cached, [0], stop, [2])) for cached in self.cache]
            bias = None
        attended = emit(
            "MultiHeadAttention", self._fold(emit, query), *keys, None, None, bias,
            domain=CONTRIB, num_heads=self.kv_heads, scale=self.node.attributes["scale"].as_float(),
        )  # fmt: skip
        return self._unfold(emit, attended)

    def _near(self, emit: Emitter, position: ir.Value, stop: ir.Value) -> ir.Value:
        """Slots [T] from the window of a query at `position` on, up to `stop` and as many more as kernels ask for."""
        low = emit("Max", emit("Sub", position, [self.window - 1]), [0])
        more = emit("Mod", emit("Sub", low, stop), [self.key_multiple])
        slots: ir.Value = emit("Slice", self.slots, low, emit("Add", stop, more), [0])
        return slots

    def _bias(self, emit: Emitter, positions: ir.Value, slots: ir.Value, stop: ir.Value) -> ir.Value:
        """What hides keys at slots [T] from folded queries at positions [1, n], of [1, 1, n x group, T] scores.

        Those behind a query's window, and from `stop` on.
        """
        each = emit("Expand", emit("Reshape", positions, [-1, 1]), [1, self.group])
        least = emit("Sub", emit("Reshape", each, [1, 1, -1, 1]), [self.window])
        seen = emit("And", emit("Greater", slots, least), emit("Less", slots, stop))
        bias: ir.Value = emit("Cast", emit("Where", seen, 0, _HIDDEN), to=int(self.dtype))
        return bias

    @property
    def group(self) -> int:
        """Query heads of a key head."""
        return self.heads // self.kv_heads

    def _fold(self, emit: Emitter, query: ir.Value) -> ir.Value:
        """Queries [1, n, heads x head size] as [1, n x group, kv heads x head size]."""
        apart = emit("Reshape", query, [-1, self.kv_heads, self.group, self.head_size])
        folded: ir.Value = emit(
            "Reshape", emit("Transpose", apart, perm=[0, 2, 1, 3]), [1, -1, self.kv_heads * self.head_size]
        )
        return folded

    def _unfold(self, emit: Emitter, attended: ir.Value) -> ir.Value:
        """The output of folded queries as [n, heads x head size]."""
        apart = emit("Reshape", attended, [-1, self.group, self.kv_heads, self.head_size])
        rows: ir.Value = emit("Reshape", emit("Transpose", apart, perm=[0, 2, 1, 3]), [-1, self.width])
        return rows
