"""Where a decoder layer begins and ends in the graph, and the boundary token's index."""

from __future__ import annotations

from torch import fx

from . import ops
from .contract import ContractError
from .graph import call_nodes, emit, find, inputs_of, layer_of, shape_of


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
        if n.op == "call_function" and layer_of(n) != layer and _is_stream(n, shape)
    )
    if len(found) != 1:
        raise ContractError(f"layer {layer} reads {len(found)} hidden states: {[n.name for n in found]}")
    return next(iter(found))


def _is_stream(node: fx.Node, shape: tuple[object, ...]) -> bool:
    value = node.meta.get("val")
    return hasattr(value, "shape") and tuple(value.shape) == shape


def boundary_index_of(gm: fx.GraphModule) -> fx.Node:
    """The graph's boundary_index node, [B] int64; made on first use, after the positions."""
    if existing := find(gm, op=ops.boundary_index):
        return existing[0]
    positions = find(gm, op=ops.token_positions)[0]
    inputs = inputs_of(gm)
    with gm.graph.inserting_after(positions):
        node = emit(gm.graph, ops.boundary_index, inputs["attention_mask"], next(iter(inputs.values())))
    node.meta["role"] = "boundary_index"
    return node
