"""Where a decoder layer begins and ends in the graph, and the boundary token's index."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

import torch
from torch import fx

from . import ops
from .contract import ContractError
from .graph import (
    call_nodes,
    emit,
    emit_parameter,
    find,
    layer_of,
    mask_of,
    role_of,
    runs,
    shape_of,
    tokens_of,
    value_of,
)

#: the weight of the norm that calibrated maps read, ones: their weights have the norm's scale
UNIT_NORM = "kv_projection.norm.weight"
NORM_EPS = 1e-6


def layer_output(gm: fx.GraphModule, layer: int) -> fx.Node:
    """The residual stream that a layer hands on, [B, S, hidden]: its one value that is read outside the layer.

    Raises ContractError where there is none or more than one.
    """
    outside = [
        n
        for n in call_nodes(gm)
        if layer_of(n) == layer and any(u.op != "output" and layer_of(u) != layer for u in n.users)
    ]
    if len(outside) != 1:
        raise ContractError(f"layer {layer} hands on {len(outside)} values: {[n.name for n in outside]}")
    return outside[0]


def layer_input(gm: fx.GraphModule, layer: int) -> fx.Node:
    """The residual stream that a layer reads, [B, S, hidden].

    Raises ContractError where it is not one value.
    """
    shape = shape_of(layer_output(gm, layer))
    found = dict.fromkeys(
        n
        for node in call_nodes(gm)
        if layer_of(node) == layer
        for n in node.all_input_nodes
        if n.op in ("call_function", "placeholder") and layer_of(n) != layer and _is_stream(n, shape)
    )
    if len(found) != 1:
        raise ContractError(f"layer {layer} reads {len(found)} hidden states: {[n.name for n in found]}")
    return next(iter(found))


def hands_on_directly(gm: fx.GraphModule, layer: int) -> bool:
    """Whether the next layer reads what a layer hands on, and nothing is added to it between them.

    gm: a graph that has both layers whole.
    """
    return layer_input(gm, layer + 1) is layer_output(gm, layer)


def runs_of(gm: fx.GraphModule, layers: Iterable[int]) -> list[tuple[int, int]]:
    """Maximal runs (first, last) of these layers, each of which reads what the one before it hands on.

    A run ends where something is added to the residual stream between two layers, as DeepStack's image features are:
    whoever handed the stream past both would lose it. gm: a graph that has these layers whole.
    """
    return list(runs(layers, partial(hands_on_directly, gm)))


def _is_stream(node: fx.Node, shape: tuple[object, ...]) -> bool:
    value = node.meta.get("val")
    return hasattr(value, "shape") and tuple(value.shape) == shape


def projected_kv(gm: fx.GraphModule, layer: int) -> tuple[fx.Node, fx.Node]:
    """A layer's keys and values as its projections make them, [B, S, kv_heads x head size], before norms and RoPE.

    Raises ContractError where a cache entry comes from no projection.
    """
    key, value = (_projection_output(cache) for cache in find(gm, op=ops.append_kv, layer=layer))
    return key, value


def _projection_output(cache: fx.Node) -> fx.Node:
    node = cache.args[1]
    while isinstance(node, fx.Node):
        roles = (role_of(node) or "", *((role_of(n) or "") for n in node.all_input_nodes))
        if roles[0].endswith(("k_proj", "v_proj")) and not roles[0].endswith("qkv_proj"):
            return node
        if any(role.endswith("qkv_proj") for role in roles[1:]):
            return node  # its slice of a fused projection
        node = next((n for n in node.all_input_nodes if n.op != "get_attr"), None)
    raise ContractError(f"{cache.name} comes from no projection")


def emit_affine(gm: fx.GraphModule, x: fx.Node, name: str, size: int, like: fx.Node, role: str) -> fx.Node:
    """A calibrated map of the hidden state x [B, S, hidden] to [B, S, size], at the graph's insertion point.

    linear(x / rms(x)) with `name`.weight [size, hidden] and `name`.bias [size]; `name`.sink [size] at position 0.
    """
    hidden, dtype = int(shape_of(x)[2]), value_of(x).dtype
    positions = find(gm, op=ops.token_positions)[0]
    ones = emit_parameter(gm, UNIT_NORM, [hidden], dtype)
    weight = emit_parameter(gm, f"{name}.weight", [size, hidden], dtype)
    bias, sink = (emit_parameter(gm, f"{name}.{kind}", [size], dtype) for kind in ("bias", "sink"))
    normed = emit(gm.graph, ops.rms_norm, x, ones, NORM_EPS, like=like)
    out = emit(gm.graph, torch.ops.aten.linear.default, normed, weight, bias, like=like)
    replaced = emit(gm.graph, ops.replace_sink, out, sink, positions, like=like)
    for node in (normed, out, replaced):
        node.meta["role"] = role
    return replaced


def boundary_index_of(gm: fx.GraphModule) -> fx.Node:
    """The graph's boundary_index node, [B] int64; made on first use, after the positions."""
    if existing := find(gm, op=ops.boundary_index):
        return existing[0]
    positions = find(gm, op=ops.token_positions)[0]
    with gm.graph.inserting_after(positions):
        node = emit(gm.graph, ops.boundary_index, mask_of(gm), tokens_of(gm))
    node.meta["role"] = "boundary_index"
    return node
