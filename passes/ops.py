"""The node vocabulary: operators that a traced decoder keeps as single nodes.

Each has a reference implementation in plain PyTorch (so every graph that passes produce can be run, and
differentiated, as it is) and a shape rule (so graphs of models of any size are built without weights).

The cache is defined by positions alone: **slot j of a cache row holds the token at position j**. A batch of
unequal rows is padded on the right, and a query at position p reads slots 0..p. No mask is needed; a padded token
computes garbage that nobody reads. This is also how ONNX Runtime's GroupQueryAttention counts.

Shapes: B batch, S new tokens, P past length, T = P + S, H heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from popcompile.upstream import OpOverload

_LIBRARY = torch.library.Library("popcompile", "FRAGMENT")

#: operator overload -> its reference implementation, a plain differentiable PyTorch function
REFERENCE: dict[OpOverload, Callable[..., Tensor]] = {}


def operator(schema: str, fake: Callable[..., Tensor]) -> Callable[[Callable[..., Tensor]], OpOverload]:
    """Register the decorated reference implementation as `popcompile::<schema>`; returns the overload."""

    def register(reference: Callable[..., Tensor]) -> OpOverload:
        name = schema.split("(", 1)[0]
        _LIBRARY.define(schema)
        _LIBRARY.impl(name, reference, "CompositeExplicitAutograd")
        torch.library.register_fake(f"popcompile::{name}", fake, lib=_LIBRARY)
        overload = getattr(torch.ops.popcompile, name).default
        REFERENCE[overload] = reference
        return overload

    return register


def _like_first(x: Tensor, *_: object, **__: object) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


# --- positions -------------------------------------------------------------------------------------------------


def _positions_shape(attention_mask: Tensor, tokens: Tensor) -> Tensor:
    return attention_mask.new_empty((tokens.shape[0], tokens.shape[1]), dtype=torch.int64)


@operator("token_positions(Tensor attention_mask, Tensor tokens) -> Tensor", _positions_shape)
def token_positions(attention_mask: Tensor, tokens: Tensor) -> Tensor:
    """Position of every new token, [B, S] int64.

    attention_mask: [B, T], 1 for the past and the new tokens that count, padded on the right.
    tokens: [B, S, ...], the new tokens; only its shape is read.

    A row's past length is min(valid tokens - 1, T - S): with one new token the rows may have different pasts, with
    several new tokens they share one past length T - S and may be padded.
    """
    return _past_length(attention_mask, tokens)[:, None] + torch.arange(tokens.shape[1], device=tokens.device)[None, :]


def _past_length(attention_mask: Tensor, tokens: Tensor) -> Tensor:
    valid = attention_mask.to(torch.int64).sum(1)
    return torch.minimum(valid - 1, torch.full_like(valid, attention_mask.shape[1] - tokens.shape[1]))


def _index_shape(attention_mask: Tensor, *_: Tensor) -> Tensor:
    return attention_mask.new_empty((attention_mask.shape[0],), dtype=torch.int64)


@operator("last_position(Tensor attention_mask, Tensor tokens) -> Tensor", _index_shape)
def last_position(attention_mask: Tensor, tokens: Tensor) -> Tensor:
    """token_positions' last column, [B] int64: of a padded row, a position past its end."""
    return _past_length(attention_mask, tokens) + (tokens.shape[1] - 1)


@operator("boundary_position(Tensor attention_mask) -> Tensor", _index_shape)
def boundary_position(attention_mask: Tensor) -> Tensor:
    """Position of each row's boundary token, its last valid one, [B] int64: token_positions at boundary_index."""
    return attention_mask.to(torch.int64).sum(1) - 1


@operator("boundary_index(Tensor attention_mask, Tensor tokens) -> Tensor", _index_shape)
def boundary_index(attention_mask: Tensor, tokens: Tensor) -> Tensor:
    """Index of each row's boundary token (its last valid one) among the new tokens, [B] int64."""
    new, total = tokens.shape[1], attention_mask.shape[1]
    valid = attention_mask.to(torch.int64).sum(1)
    return torch.clamp(valid - 1 - torch.full_like(valid, total - new), min=0)


def _one_token_shape(x: Tensor, index: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], 1, *x.shape[2:]))


@operator("select_boundary(Tensor x, Tensor index) -> Tensor", _one_token_shape)
def select_boundary(x: Tensor, index: Tensor) -> Tensor:
    """The boundary token's row of x: [B, S, ...] -> [B, 1, ...]; index [B] from boundary_index."""
    shape = [index.shape[0], 1] + [1] * (x.dim() - 2)
    return torch.gather(x, 1, index.view(shape).expand(-1, -1, *x.shape[2:]))


@operator("insert_boundary(Tensor x, Tensor boundary, Tensor index) -> Tensor", _like_first)
def insert_boundary(x: Tensor, boundary: Tensor, index: Tensor) -> Tensor:
    """x [B, S, ...] with the boundary token's row replaced by boundary [B, 1, ...]."""
    is_boundary = torch.arange(x.shape[1], device=x.device)[None, :] == index[:, None]
    return torch.where(is_boundary.view(*is_boundary.shape, *[1] * (x.dim() - 2)), boundary, x)


def _tail_tokens(tokens: Tensor, window: int) -> int:
    """How many tokens a row's tail has room for: min(window, S)."""
    return torch.sym_min(tokens.shape[1], window)


@operator("tail_start(Tensor attention_mask, Tensor tokens, int window) -> Tensor", _index_shape)
def tail_start(attention_mask: Tensor, tokens: Tensor, window: int) -> Tensor:
    """Index of the first token of each row's tail, its last min(window, S) valid tokens, among the new ones, [B] int64.

    Of a row with fewer tokens than that, the tail begins at 0 and ends with padding.
    """
    index = REFERENCE[boundary_index](attention_mask, tokens)
    return torch.clamp(index - (_tail_tokens(tokens, window) - 1), min=0)


@operator("tail_end(Tensor attention_mask, Tensor tokens, int window) -> Tensor", _index_shape)
def tail_end(attention_mask: Tensor, tokens: Tensor, window: int) -> Tensor:
    """Position of the last token of each row's tail, padding included, [B] int64: token_positions' there."""
    start = REFERENCE[tail_start](attention_mask, tokens, window)
    return _past_length(attention_mask, tokens) + start + (_tail_tokens(tokens, window) - 1)


def _tail_shape(x: Tensor, start: Tensor, window: int) -> Tensor:
    return x.new_empty((x.shape[0], _tail_tokens(x, window), *x.shape[2:]))


@operator("select_tail(Tensor x, Tensor start, int window) -> Tensor", _tail_shape)
def select_tail(x: Tensor, start: Tensor, window: int) -> Tensor:
    """The tails' rows of x: [B, S, ...] -> [B, min(window, S), ...]; start [B] from tail_start."""
    return torch.gather(x, 1, _tail_indices(start, _tail_tokens(x, window), x))


@operator("insert_tail(Tensor x, Tensor tail, Tensor start) -> Tensor", _like_first)
def insert_tail(x: Tensor, tail: Tensor, start: Tensor) -> Tensor:
    """x [B, S, ...] with the tails' rows replaced by tail [B, min(window, S), ...]."""
    return torch.scatter(x, 1, _tail_indices(start, tail.shape[1], x), tail)


def _tail_indices(start: Tensor, count: int, x: Tensor) -> Tensor:
    """start, start + 1, ... for every feature of x: [B, count, ...]."""
    indices = start[:, None] + torch.arange(count, device=x.device)
    return indices.view(*indices.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])


@operator("skip_layers(Tensor x, int first, int last) -> Tensor", _like_first)
def skip_layers(x: Tensor, first: int, last: int) -> Tensor:
    """The residual stream [B, S, hidden] handed past the pruned layers first..last (inclusive): the identity."""
    return x.clone()


@operator("replace_sink(Tensor x, Tensor sink, Tensor positions) -> Tensor", _like_first)
def replace_sink(x: Tensor, sink: Tensor, positions: Tensor) -> Tensor:
    """x [B, S, F] with sink [F] for the token at position 0, the attention sink; positions [B, S]."""
    return torch.where((positions == 0)[:, :, None], sink, x)


def _second_shape(before: Tensor, after: Tensor, *_: object) -> Tensor:
    return torch.empty_like(after, memory_format=torch.contiguous_format)


@operator(
    "virtual_gate(Tensor before, Tensor after, Tensor gates, int[] entry, Tensor boundary_index) -> Tensor",
    _second_shape,
)
def virtual_gate(before: Tensor, after: Tensor, gates: Tensor, entry: list[int], boundary_index: Tensor) -> Tensor:
    """before + g · (after - before) [B, S, hidden], for analysis: g scales what was added to the residual stream.

    gates[entry] is a pair [prefill, decode]: context tokens, those before boundary_index [B], take the prefill gate,
    the boundary token and what follows it the decode gate. A gate of 1 gives `after`, of 0 `before`, both bit for bit.
    """
    prefill, decode = gates[tuple(entry)]
    is_context = torch.arange(before.shape[1], device=before.device)[None, :] < boundary_index[:, None]
    return torch.lerp(before, after, torch.where(is_context, prefill, decode).to(before.dtype)[..., None])


# --- cache and attention ---------------------------------------------------------------------------------------


def _appended_shape(past: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    return new.new_empty((new.shape[0], new.shape[1], past.shape[2] + new.shape[2], new.shape[3]))


@operator("append_kv(Tensor past, Tensor new, Tensor positions) -> Tensor", _appended_shape)
def append_kv(past: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    """Grow a cache: past [B, G, P, D], new [B, G, S, D] -> [B, G, P + S, D], new tokens at their positions [B, S]."""
    return write_kv_reference(torch.cat((past, torch.zeros_like(new)), dim=2), new, positions)


def write_kv_reference(cache: Tensor, new: Tensor, positions: Tensor) -> Tensor:
    """cache [B, G, T, D] with new [B, G, S, D] written at the slots that positions [B, S] names."""
    slots = positions[:, None, :, None].expand(-1, new.shape[1], -1, new.shape[3])
    return torch.scatter(cache, 2, slots, new)


write_kv = operator("write_kv(Tensor cache, Tensor new, Tensor positions) -> Tensor", _like_first)(write_kv_reference)


def _attention_shape(query: Tensor, key: Tensor, value: Tensor, *_: object, ends: Tensor | None = None) -> Tensor:
    batch, heads, queries, _ = query.shape
    return query.new_empty((batch, queries, heads, value.shape[3])).transpose(1, 2)


@operator(
    "attention(Tensor query, Tensor key, Tensor value, Tensor positions, float scale, int window, float softcap,"
    " Tensor? sinks=None, *, Tensor? ends=None) -> Tensor",
    _attention_shape,
)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None = None,
    *,
    ends: Tensor | None = None,
) -> Tensor:
    """Causal grouped-query attention over a cache.

    query [B, H, S, D] at positions [B, S]; key, value [B, G, T, D] with slot = position. window > 0 limits a query
    to the last `window` positions, itself included (sliding window); softcap > 0 caps scores at ±softcap (Gemma 2).
    sinks [H]: scores of a key without a value, one for each head (gpt-oss). ends [B, S]: the last slot that a query
    sees, by default its own position; of image_ends where tokens of an image see all of it (Gemma 3).
    Returns [B, H, S, D], in memory as [B, S, H, D], which is what modules go on with.
    """
    slots = torch.arange(key.shape[2], device=query.device)
    visible = slots <= (positions if ends is None else ends)[:, :, None]
    if window > 0:
        visible = visible & (slots > positions[:, :, None] - window)
    out = attend(query, key, value, visible[:, None], scale, softcap, sinks)
    return out.transpose(1, 2).contiguous().transpose(1, 2)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    visible: Tensor,
    scale: float,
    softcap: float,
    sinks: Tensor | None = None,
) -> Tensor:
    """Grouped-query attention of query [B, H, S, D] to the keys [B, G, T, D] that visible [B or 1, 1, S, T] names."""
    if softcap == 0.0 and sinks is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=visible, scale=scale, enable_gqa=True)
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scores = query @ key.transpose(2, 3) * (scale / (softcap or 1.0))
    if softcap > 0.0:
        scores = torch.tanh(scores) * softcap
    return shares(scores.masked_fill(~visible, float("-inf")), sinks) @ value


def shares(scores: Tensor, sinks: Tensor | None = None) -> Tensor:
    """softmax of scores [B, H, S, T] over the keys, in fp32, and over a sink [H] that gets its share of each head."""
    if sinks is None:
        return scores.float().softmax(-1).to(scores.dtype)
    column = sinks[None, :, None, None].expand(*scores.shape[:3], 1)
    return torch.cat((scores, column), dim=-1).float().softmax(-1)[..., :-1].to(scores.dtype)


def _padded_shape(x: Tensor, size: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], size))


@operator("pad_heads(Tensor x, int size) -> Tensor", _padded_shape)
def pad_heads(x: Tensor, size: int) -> Tensor:
    """x [..., D] with zeros behind, [..., size]; a size that is larger than D."""
    return torch.cat((x, x.new_zeros((*x.shape[:-1], size - x.shape[-1]))), dim=-1)


# --- fused element-wise patterns -------------------------------------------------------------------------------


@operator("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor", _like_first)
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) * weight over the last dimension, computed in fp32 and returned in x's dtype."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * weight.float()).to(x.dtype)


@operator("rotary_embedding(Tensor x, Tensor positions, Tensor cos, Tensor sin) -> Tensor", _like_first)
def rotary_embedding(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + R/2) of the first R features of x [B, H, S, D]; cos, sin [positions, R/2] are tables."""
    half = cos.shape[1]
    c, s = cos[positions][:, None], sin[positions][:, None]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * c - second * s, second * c + first * s, rest), dim=-1)


def _axes_last_shape(position_ids: Tensor) -> Tensor:
    axes, batch, sequence = position_ids.shape
    return position_ids.new_empty((batch, sequence, axes))


@operator("rope_positions(Tensor position_ids) -> Tensor", _axes_last_shape)
def rope_positions(position_ids: Tensor) -> Tensor:
    """position_ids [A, B, S] as [B, S, A]: the A positions that RoPE gives each token, M-RoPE's time, height and width.

    Tokens are dimension 1, as everywhere. Slots of the cache are token_positions' affair.
    """
    return position_ids.permute(1, 2, 0).clone(memory_format=torch.contiguous_format)


def _rows_shape(positions: Tensor, axes: list[int]) -> Tensor:
    return positions.new_empty((positions.shape[0] * positions.shape[1], len(axes)))


@operator("rotary_rows(Tensor positions, int[] axes) -> Tensor", _rows_shape)
def rotary_rows(positions: Tensor, axes: list[int]) -> Tensor:
    """The row of RoPE's tables that pair i of each token reads, positions[..., axes[i]]: [B, S, A] -> [B S, R/2]."""
    return positions[:, :, list(axes)].flatten(0, 1)


def _token_rows_shape(tokens: Tensor) -> Tensor:
    return tokens.new_empty(tokens.shape[:2], dtype=torch.int64)


@operator("token_rows(Tensor tokens) -> Tensor", _token_rows_shape)
def token_rows(tokens: Tensor) -> Tensor:
    """Each token's row in [B S, ...], [B, S] int64; of tokens [B, S, ...] only the shape is read."""
    batch, count = tokens.shape[:2]
    return torch.arange(batch * count, device=tokens.device).view(batch, count)


@operator(
    "rotary_embedding_axes(Tensor x, Tensor positions, Tensor cos, Tensor sin, int[] axes) -> Tensor", _like_first
)
def rotary_embedding_axes(x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor, axes: list[int]) -> Tensor:
    """rotary_embedding of x [B, H, S, D] whose pair i turns by the position positions[..., axes[i]] of [B, S, A]."""
    rows = REFERENCE[rotary_rows](positions, axes)
    gathered = (torch.gather(table, 0, rows) for table in (cos, sin))
    return REFERENCE[rotary_embedding](x, REFERENCE[token_rows](positions), *gathered)


#: rotations, of one position for each token or of several; both read x first
ROTATIONS = (rotary_embedding, rotary_embedding_axes)


# --- images ----------------------------------------------------------------------------------------------------


@operator("rotate_tokens(Tensor x, Tensor cos, Tensor sin) -> Tensor", _like_first)
def rotate_tokens(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (i, i + D/2) of x [N, H, D]; a token's angles are its own row of cos, sin [N, D/2]."""
    first, second = x.chunk(2, dim=-1)
    c, s = cos[:, None], sin[:, None]
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1)


@operator("packed_attention(Tensor query, Tensor key, Tensor value, Tensor length, float scale) -> Tensor", _like_first)
def packed_attention(query: Tensor, key: Tensor, value: Tensor, length: Tensor, scale: float) -> Tensor:
    """Attention without a mask among each `length` tokens in turn: frames of one size, behind one another.

    query, key, value [N, H, D]; length [] int64, a divisor of N. Returns [N, H, D]. Frames are a batch, so that no
    mask [N, N] is needed to keep them apart, and kernels that never hold all scores can be used.
    """
    heads, size = query.shape[1:]
    q, k, v = (t.reshape(-1, int(length), heads, size).transpose(1, 2) for t in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).reshape(query.shape)


def _ends_shape(is_image: Tensor, positions: Tensor, attention_mask: Tensor) -> Tensor:
    return torch.empty_like(positions)


@operator("image_ends(Tensor is_image, Tensor positions, Tensor attention_mask) -> Tensor", _ends_shape)
def image_ends(is_image: Tensor, positions: Tensor, attention_mask: Tensor) -> Tensor:
    """The last slot that each new token sees [B, S] int64: of an image's token that image's last, else its own.

    is_image [B, S] bool, positions [B, S], attention_mask [B, T]. An image is a run of tokens that are one, as long as
    it is among the new tokens; what is behind a row's last valid token is none.
    """
    image = is_image & (positions < attention_mask.to(torch.int64).sum(1)[:, None])
    text = torch.where(image, positions[:, -1:] + 1, positions)  # beyond the row for an image's tokens
    behind = text.flip(1).cummin(1).values.flip(1)  # the next token of text
    return torch.where(image, behind - 1, positions)


@operator("scatter_features(Tensor x, Tensor places, Tensor features) -> Tensor", _like_first)
def scatter_features(x: Tensor, places: Tensor, features: Tensor) -> Tensor:
    """x [B, S, W] with the rows of features [n, W], in order, where places [B, S] bool holds; x itself if n is 0.

    Of n > 0 features, all have a place, and every place has one: another number is an error.
    """
    out = x.clone()
    if len(features):
        out[places] = features
    return out


# --- mixtures of experts ---------------------------------------------------------------------------------------


@operator(
    "experts(Tensor x, Tensor gate_up, Tensor down, Tensor index, Tensor weights, Tensor? gate_up_bias=None,"
    " Tensor? down_bias=None, float alpha=1.0, float shift=0.0, float limit=0.0) -> Tensor",
    _like_first,
)
def experts(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    index: Tensor,
    weights: Tensor,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 1.0,
    shift: float = 0.0,
    limit: float = 0.0,
) -> Tensor:
    """The weighted sum of what each token's k experts make of it.

    x [N, hidden]; index [N, k] int64 and weights [N, k]: a token's experts and how much each counts. An expert is a
    SwiGLU block, down @ (swish(gate @ x) * (up @ x)); gate_up [E, 2 I, hidden] holds gate above up, down is
    [E, hidden, I]. gate_up_bias [E, 2 I], down_bias [E, hidden]. swish(g) is g * sigmoid(alpha * g), shift is added to
    the rows of up, and limit > 0 caps gates at limit and the rows of up at ±limit, before that. Returns [N, hidden].
    """
    out = torch.zeros_like(x)
    for expert in index.unique().tolist():
        token, slot = torch.where(index == expert)
        gate, up = F.linear(x[token], gate_up[expert], _of(gate_up_bias, expert)).chunk(2, dim=-1)
        if limit > 0:
            gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        swish = F.silu(gate) if alpha == 1 else gate * torch.sigmoid(gate * alpha)
        inner = swish * up if shift == 0 else swish * (up + shift)
        y = F.linear(inner, down[expert], _of(down_bias, expert)) * weights[token, slot, None]
        out = out.index_add(0, token, y.to(x.dtype))
    return out


def _of(biases: Tensor | None, expert: int) -> Tensor | None:
    return None if biases is None else biases[expert]
