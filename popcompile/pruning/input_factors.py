"""Measure the input features of linear layers for BalanceActivations, which scales them towards one size.

    f = sqrt(rms over tokens of x / rms(x))

The size of a feature is taken of tokens that are scaled to one size themselves, as int8 with a scale for every token
does: an attention sink's activations, a thousand times as large, count no more than another token's. The square root
leaves a feature half of its lead, in the logarithm: with all of it taken away, weights are spread as activations were.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from popcompile.pruning.layerwise import LayerwiseModel
from popcompile.pruning.rows import Rows

#: texts that are measured
_TEXTS = 16
#: the smallest factor, for a feature that calibration text hardly has and a prompt may have
_LEAST = 1 / 8


@torch.no_grad()
def input_factors(model: LayerwiseModel, rows: Rows, progress: Callable[[int, int], Any]) -> dict[str, Tensor]:
    """A factor for each input feature [F], by the constant's name that BalanceActivations reads, on the CPU. rows: of
    any texts.
    """
    chosen = rows[:: -(-len(rows) // _TEXTS)]
    texts = [model.tokens(row, row.slots) for row in (chosen[i : i + 1] for i in range(len(chosen)))]
    x, squares = [model.embed(tokens) for tokens in texts], dict[str, Tensor]()
    for layer in range(model.num_layers):
        for i, tokens in enumerate(texts):
            x[i], inputs = model.layer_and_inputs(layer, x[i], tokens, tokens.among_themselves())
            for name, features in inputs.items():
                even = features.square() / features.square().mean(-1, keepdim=True).clamp(min=torch.finfo().tiny)
                squares[name] = squares.get(name, 0.0) + even.mean((0, 1)) / len(texts)
        progress(layer + 1, model.num_layers)
    return {name: (square**0.25).clamp(min=_LEAST).cpu() for name, square in squares.items()}
