"""Lower attention and its cache update to ONNX Runtime's GroupQueryAttention.

    attention(q, append_kv(past_k, k), append_kv(past_v, v))
        => out, present_k, present_v = GroupQueryAttention(q, k, v, past_k, past_v)
    attention(q, write_kv(cache_k, k), write_kv(cache_v, v))    the boundary token, or the tail
        => the same, with the cache as the past

The operator takes and returns [B, S, heads x head size], so the transposes around attention go away. It counts valid
keys with seqlens_k [B] (position of the last query) from the left, as our positions do, and rotates queries and new
keys itself; where it cannot (_rotates), RoPE is lowered on its own in the same layout.

It is causal. Where tokens of an image see all of it, their rows are computed apart, by an operator that is none of
ONNX Runtime's: export/image_attention.py says what it is made of.

    attention(.., ends)   => GroupQueryAttention, then ImageAttention(out, q, present_k, present_v, positions, ends)

Spec: https://github.com/microsoft/onnxruntime/blob/main/docs/ContribOperators.md#commicrosoftgroupqueryattention
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.passes.infra.pass_base import PassResult

from . import ops
from .base import Pass
from .graph import emit, emit_sizes, find, mask_of, replace, shape_of, value_of
from .lower_rotary_embedding import emit_rotary
from .onnx_ops import CONTRIB, IMAGE_ATTENTION, emit_onnx, emit_onnx_multi

aten = torch.ops.aten


class LowerAttention(Pass):
    stages = ("prefill", "decode")

    def requires(self, graph_module: fx.GraphModule) -> None:
        for node in find(graph_module, op=ops.attention):
            for cache in node.args[1:3]:
                assert isinstance(cache, fx.Node)
                self.check(cache.target in (ops.append_kv, ops.write_kv), f"{node.name} reads no cache of its own")
            self.check(_counts_tokens(node.args[3]), f"{node.name}'s positions are not those of the new tokens")
            plain = node.args[6] == 0.0 and len(node.args) == 7
            self.check(plain or "ends" not in node.kwargs, f"{node.name} of images has sinks, or caps its scores")

    def call(self, graph_module: fx.GraphModule) -> PassResult:
        lowering = _Lowering(graph_module)
        for node in find(graph_module, op=ops.attention):
            lowering.lower(node)
            self.matches += 1
        for append in find(graph_module, op=ops.append_kv):
            lowering.append_by_concat(append)
        graph_module.graph.eliminate_dead_code()
        return PassResult(graph_module, self.matches > 0)

    def ensures(self, graph_module: fx.GraphModule) -> None:
        left = [n for op in (ops.attention, ops.append_kv, ops.write_kv) for n in find(graph_module, op=op)]
        self.check(not left, f"{[n.name for n in left]} are left")


class _Lowering:
    def __init__(self, gm: fx.GraphModule) -> None:
        self.graph = gm.graph
        self.mask = mask_of(gm)
        positions = find(gm, op=ops.token_positions)[0]
        with self.graph.inserting_after(positions):
            self.total = emit(self.graph, aten.sym_size.int, self.mask, 1)
        with self.graph.inserting_after(self.total):
            self.total_scalar = emit(self.graph, aten.full.default, [], self.total, dtype=torch.int32)
        self.batch = self._size(positions, 0)
        self.sizes: dict[fx.Node, fx.Node | int] = {}
        self.last_positions: dict[fx.Node, fx.Node] = {}

    def _size(self, node: fx.Node, dim: int) -> fx.Node | int:
        """A dimension of a value: a number, or a node that computes it."""
        value = shape_of(node)[dim]
        if isinstance(value, int):
            return value
        with self.graph.inserting_after(node):
            return emit(self.graph, aten.sym_size.int, node, dim)

    def _queries(self, positions: fx.Node) -> fx.Node | int:
        """Number of query tokens."""
        if positions not in self.sizes:
            self.sizes[positions] = self._size(positions, 1)
        return self.sizes[positions]

    def _seqlens(self, positions: fx.Node) -> fx.Node:
        """seqlens_k: position of each row's last query, [B] int32."""
        if positions not in self.last_positions:
            with self.graph.inserting_after(max(positions, self.total_scalar)):
                if positions.target == ops.select_boundary:
                    last = emit(self.graph, ops.boundary_position, self.mask)
                elif positions.target == ops.select_tail:
                    everything, _, window = positions.args
                    last = emit(self.graph, ops.tail_end, *everything.args, window)
                else:
                    last = emit(self.graph, ops.last_position, *positions.args)
            with self.graph.inserting_after(last):
                self.last_positions[positions] = emit(self.graph, aten.to.dtype, last, torch.int32)
        return self.last_positions[positions]

    def lower(self, node: fx.Node) -> None:
        query, key_cache, value_cache, positions, scale, window, softcap, *sinks = node.args
        assert isinstance(query, fx.Node) and isinstance(key_cache, fx.Node) and isinstance(value_cache, fx.Node)
        assert isinstance(positions, fx.Node) and isinstance(window, int)
        heads, kv_heads, head_size = shape_of(query)[1], shape_of(key_cache)[1], shape_of(query)[3]
        dtype = value_of(query).dtype
        queries, seqlens = self._queries(positions), self._seqlens(positions)
        (past_key, key), (past_value, value) = key_cache.args[:2], value_cache.args[:2]
        attributes: dict[str, Any] = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": scale}
        if window:
            attributes["local_window_size"] = window
        if softcap:
            attributes["softcap"] = softcap
        tables: list[fx.Node] = []
        if _rotates(query, key, positions):
            attributes["do_rotary"] = 1
            tables = [query.args[2], query.args[3]]
            query, key = query.args[0], key.args[0]
        others: list[Any] = []
        if sinks:  # behind tables, positions of the tokens and a bias
            others = [*[None] * (4 - len(tables)), *sinks]
        present = [self.batch, kv_heads, self.total, head_size]
        with self.graph.inserting_before(node):
            flat = [self._flat_heads(t) for t in (query, key, value)]
            fused = emit_onnx_multi(
                self.graph,
                f"{CONTRIB}::GroupQueryAttention",
                [*flat, past_key, past_value, seqlens, self.total_scalar, *tables, *others],
                attributes,
                shapes=[[self.batch, queries, heads * head_size], present, present],
                dtypes=[dtype] * 3,
                like=node,
            )
            out, new_key, new_value = (emit(self.graph, operator.getitem, fused, i, like=node) for i in range(3))
            ends: Any = node.kwargs.get("ends")
            if ends is not None and positions.target != ops.select_boundary:  # nobody is behind the boundary token
                inputs = [out, flat[0], new_key, new_value, positions, ends, *tables]
                shape = [self.batch, queries, heads * head_size]
                out = emit_onnx(self.graph, IMAGE_ATTENTION, inputs, attributes, shape=shape, dtype=dtype, like=node)
            self._replace_output(node, out, queries, heads, head_size)
        replace(key_cache, new_key)
        replace(value_cache, new_value)

    def _flat_heads(self, node: Any) -> fx.Node:
        """[B, H, S, D] as [B, S, H x D], going back through transposes instead of adding some."""
        assert isinstance(node, fx.Node)
        if node.target == ops.rotary_embedding:
            x, positions, cos, sin = node.args
            return emit_rotary(self.graph, self._flat_heads(x), positions, cos, sin, like=node, heads=shape_of(node)[1])
        tokens_first = self._tokens_first(node)
        before = tokens_first.args[0] if tokens_first.target == aten.view.default else None
        if isinstance(before, fx.Node) and len(shape_of(before)) == 3:
            return before
        return emit(self.graph, aten.flatten.using_ints, tokens_first, 2, 3, like=node)

    def _tokens_first(self, node: fx.Node) -> fx.Node:
        """[B, H, S, D] as [B, S, H, D]; a norm over D commutes with the transpose."""
        if node.target == aten.transpose.int and set(node.args[1:]) == {1, 2}:
            return node.args[0]
        if node.target == ops.rms_norm:
            x, weight, eps = node.args
            assert isinstance(x, fx.Node)
            return emit(self.graph, ops.rms_norm, self._tokens_first(x), weight, eps, like=node)
        if node.target == ops.pad_heads:
            x, size = node.args
            assert isinstance(x, fx.Node)
            return emit(self.graph, ops.pad_heads, self._heads_last(x), size, like=node)
        return emit(self.graph, aten.transpose.int, node, 1, 2, like=node)

    def _heads_last(self, node: fx.Node) -> fx.Node:
        """_tokens_first, of rotated heads too."""
        if node.target != ops.rotary_embedding:
            return self._tokens_first(node)
        _, heads, _, size = shape_of(node)
        flat = self._flat_heads(node)
        return emit(self.graph, aten.view.default, flat, [*emit_sizes(self.graph, flat)[:2], heads, size], like=node)

    def _replace_output(self, node: fx.Node, out: fx.Node, queries: Any, heads: int, head_size: int) -> None:
        """Let the users of attention's [B, H, S, D] read [B, S, H x D]."""
        for transposed in list(node.users):
            if transposed.target != aten.transpose.int:
                continue
            for user in list(transposed.users):
                if len(shape_of(user)) == 3 and user.target in (aten.reshape.default, aten.view.default):
                    replace(user, out)
            if transposed.users:
                replace(
                    transposed,
                    emit(self.graph, aten.view.default, out, [self.batch, queries, heads, head_size], like=transposed),
                )
            else:
                self.graph.erase_node(transposed)
        if node.users:
            heads_last = emit(self.graph, aten.view.default, out, [self.batch, queries, heads, head_size], like=node)
            node.replace_all_uses_with(emit(self.graph, aten.transpose.int, heads_last, 1, 2, like=node))
        self.graph.erase_node(node)

    def append_by_concat(self, append: fx.Node) -> None:
        """A cache entry that no attention of this stage makes: projected keys or values, after the past.

        New tokens sit at slots [past, past + S). Where rows have different pasts there is one new token, which is the
        boundary token; its own slot is written by the attention that reads this.
        """
        past, new, _ = append.args
        with self.graph.inserting_before(append):
            replace(append, emit(self.graph, aten.cat.default, [past, new], 2, like=append))


def _counts_tokens(positions: Any) -> bool:
    """Whether positions are token_positions, or those of the boundary tokens or tails."""
    if isinstance(positions, fx.Node) and positions.target in (ops.select_boundary, ops.select_tail):
        positions = positions.args[0]
    return isinstance(positions, fx.Node) and positions.target == ops.token_positions


def _rotates(query: fx.Node, key: Any, positions: fx.Node) -> bool:
    """Whether the operator can take over the rotation of query and key [B, H, S, D].

    Its kernels rotate pairs in vectors of 8, of heads that are multiples of 16.
    """
    if not isinstance(key, fx.Node) or not query.target == key.target == ops.rotary_embedding:
        return False
    if query.args[1:] != key.args[1:] or query.args[1] is not positions or len(key.users) > 1:
        return False
    cos = query.args[2]
    assert isinstance(cos, fx.Node)
    head_size, pairs = shape_of(query)[3], shape_of(cos)[1]
    return bool(head_size % 16 == 0 and pairs % 8 == 0)
