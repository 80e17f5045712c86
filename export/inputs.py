"""The inputs of a written graph, by what they are and not by their place."""

from __future__ import annotations

import onnx_ir as ir

from popcompile.passes.graph import MASK, TOKENS


def tokens_input(graph: ir.Graph) -> ir.Value:
    """The input of the new tokens [batch, sequence, ...]."""
    return next(value for value in graph.inputs if value.name in TOKENS)


def mask_input(graph: ir.Graph) -> ir.Value:
    """The input of the mask [batch, past + sequence]."""
    return next(value for value in graph.inputs if value.name == MASK)
