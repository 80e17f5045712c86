"""What each layer executes in each stage, from the transformed graphs: the per-layer table of the report."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from popcompile.passes import Program, ops
from popcompile.passes.flops import REFERENCE_SIZES, flops_by_layer, node_flops
from popcompile.passes.graph import dimension_symbols, find, role_of
from popcompile.passes.insert_kv_projection import projection_nodes
from popcompile.passes.layers import runs_of


@dataclass(frozen=True)
class LayerRow:
    """One decoder layer. FLOPs at the reference sizes of passes/flops.py.

    prefill_tokens: which tokens run through the whole layer in prefill. kv_from: what its K/V cache entries of
    context tokens are computed from. window: sliding window in tokens, 0 for full attention.
    """

    layer: int
    pruned: bool
    prefill_tokens: str
    kv_from: str
    window: int
    full_prefill_flops: int
    prefill_flops: int
    decode_flops: int


def layer_table(program: Program, pruned: list[int], window: int) -> list[dict[str, Any]]:
    """A row per layer, of a program after `transformations` and before `lowering`. window: that of the prefill."""
    last = "boundary token" if window == 1 else f"last {window} tokens"
    prefill, decode = program.graphs["prefill"], program.graphs["decode"]
    full = flops_by_layer(decode, "prefill", REFERENCE_SIZES["prefill"])
    pop, step = flops_by_layer(prefill, "prefill"), flops_by_layer(decode, "decode")
    entry = {layer: first for first, end in runs_of(decode, pruned) for layer in range(first, end + 1)}
    rows = []
    for layer in range(program.num_layers):
        attention = find(prefill, op=ops.attention, layer=layer)
        boundary_only = all((role_of(n) or "").startswith("boundary") for n in attention)
        roles = {role_of(n) or "" for n in projection_nodes(prefill, layer)}
        kind = "calibrated projection" if "kv_projection/calibrated" in roles else "own projection"
        projected = any(role.startswith("kv_projection") for role in roles)
        source = f"{kind} of x entering layer {entry[layer]}" if projected else "its own layer"
        sliding = attention[0].args[5]
        assert isinstance(sliding, int)
        rows.append(
            LayerRow(
                layer=layer,
                pruned=layer in pruned,
                prefill_tokens=last if boundary_only else "all tokens",
                kv_from=source,
                window=sliding,
                full_prefill_flops=full.get(layer, 0),
                prefill_flops=pop.get(layer, 0),
                decode_flops=step.get(layer, 0),
            )
        )
    return [asdict(row) for row in rows]


def full_prefill_one_logit(decode: fx.GraphModule, sizes: dict[str, int] | None = None) -> int:
    """FLOPs of prefill through the whole model with the LM head on the boundary token only.

    What an unpruned runtime can do at best: the saving beyond this is the pruned layers' own. sizes: by default
    prefill's reference sizes.
    """
    sizes = sizes or REFERENCE_SIZES["prefill"]
    values = {symbol: sizes[name] for name, symbol in dimension_symbols(decode).items()}
    head = node_flops(find(decode, role="lm_head")[0], values, sizes["total"])
    return sum(flops_by_layer(decode, "prefill", sizes).values()) - head + head // sizes["sequence"]
