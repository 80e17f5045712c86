"""ONNX operators as FX nodes.

torch.onnx.ops.symbolic puts any ONNX operator into an FX graph as a real node. Lowering passes emit such calls;
export/operators.py writes them out as they stand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.onnx.ops import symbolic, symbolic_multi_out

from .graph import emit

#: ONNX Runtime's own operators
CONTRIB = "com.microsoft"
#: our own, which export takes apart: attention's output [B, S, heads x head size] with the rows of images put in
IMAGE_ATTENTION = "popcompile::ImageAttention"


def emit_onnx(
    graph: fx.Graph,
    operator: str,
    inputs: Sequence[fx.Node | None],
    attributes: Mapping[str, Any],
    *,
    shape: Sequence[Any],
    dtype: torch.dtype,
    like: fx.Node | None = None,
) -> fx.Node:
    """Append an ONNX operator ("domain::Name", or "Name" of the standard) with one output.

    shape: ints or size nodes, one per dimension of the output.
    """
    return emit(
        graph, symbolic, operator, list(inputs), dict(attributes), dtype=dtype, shape=list(shape), version=1, like=like
    )


def emit_onnx_multi(
    graph: fx.Graph,
    operator: str,
    inputs: Sequence[fx.Node | None],
    attributes: Mapping[str, Any],
    *,
    shapes: Sequence[Sequence[Any]],
    dtypes: Sequence[torch.dtype],
    like: fx.Node | None = None,
) -> fx.Node:
    """Append an ONNX operator with several outputs; read them with operator.getitem."""
    return emit(
        graph,
        symbolic_multi_out,
        operator,
        list(inputs),
        dict(attributes),
        dtypes=list(dtypes),
        shapes=[list(s) for s in shapes],
        version=1,
        like=like,
    )


def onnx_op_type(node: fx.Node) -> str | None:
    """The ONNX operator that a node stands for, without its domain, or None."""
    return str(node.args[0]).rpartition("::")[2] if node.target in (symbolic, symbolic_multi_out) else None


def onnx_inputs(node: fx.Node) -> Sequence[fx.Node | None]:
    return node.args[1]


def attributes_of(node: fx.Node) -> dict[str, Any]:
    """The attributes of an ONNX operator node."""
    return dict(node.args[2])
