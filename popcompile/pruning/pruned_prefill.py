"""Run what follows a pruned prefill before it is compiled: in PyTorch, on the layers of the canonical graph.

    context    a prompt's tokens but those of the window at its end: the pruned prefill's hidden states
    tail       tokens that follow the context or its beginning: every layer, in full

A tail may hold many blocks, each the end of a prompt and what follows it: a block attends to the pruned prefill of the
tokens before it and to itself, as it would were it alone. That gives many first tokens per text. Everything is
differentiable in the calibrated maps.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from popcompile.pruning.layerwise import Keys, LayerwiseModel, Tokens
from popcompile.pruning.regression import Calibration
from popcompile.pruning.rows import Rows


@dataclass(frozen=True)
class Prompts:
    """Context and tail tokens, both one after the other, and which of these each may attend to.

    visible: [B, C + Q, C + Q] for C context and Q tail tokens.
    """

    context: Tokens
    tail: Tokens
    together: Tokens
    visible: Tensor

    @classmethod
    def of(cls, model: LayerwiseModel, rows: Rows, count: int, positions: Tensor, begins: Tensor) -> Prompts:
        """count: tokens of the context, C, which begins each row. positions: of the tail's tokens, [B, Q].

        begins: [B, Q], where the block of a tail's token begins, which no two blocks of a row share. Both are on the
        CPU, as rows are.
        """
        size = count + positions.shape[1]
        from_zero = rows.slots[:, :count]
        context, tail = model.tokens(rows, from_zero), model.tokens(rows, positions)
        together = model.tokens(rows, torch.cat((from_zero, positions), 1))
        slots, begins = tail.positions, begins.to(model.device)
        visible = slots.new_zeros(len(rows), size, size, dtype=torch.bool)
        visible[:, :count, :count] = slots.new_ones(count, count, dtype=torch.bool).tril()
        visible[:, count:, :count] = context.positions[:1] < begins[:, :, None]
        visible[:, count:, count:] = (begins[:, :, None] == begins[:, None]) & (slots[:, :, None] >= slots[:, None])
        if together.ends is not None:
            visible |= _rest_of_images(together, torch.cat((torch.full_like(context.positions, count), begins), 1))
        return cls(context, tail, together, visible)


def _rest_of_images(tokens: Tokens, begins: Tensor) -> Tensor:
    """What is of a token's image behind it, [B, S, S]: in its own block, and for the context in the tail that goes on
    from its end. begins: of blocks, and that end for the context's tokens [B, S].

    Where another block begins inside an image, the context sees its own copy of the image's rest.
    """
    assert tokens.ends is not None
    slots = tokens.positions[:, None, :]
    behind = (slots > tokens.positions[:, :, None]) & (slots <= tokens.ends[:, :, None])
    return behind & (begins[:, :, None] == begins[:, None])


def last_hidden_state(
    model: LayerwiseModel,
    prompts: Prompts,
    entering: tuple[Tensor, Tensor],
    first: int,
    pruned: list[int],
    calibration: Calibration,
) -> Tensor:
    """The tail's hidden state after the last layer [B, Q, hidden], its context's prefill being pruned.

    entering: hidden states of context and tail [B, C and Q, hidden] before layer `first`, none before it being pruned.
    calibration: maps in place of pruned layers; where it has none, the layer's own projections.
    """
    x, y = entering
    count, ends, begin = x.shape[1], dict(model.runs(pruned)), -1
    for layer in range(first, model.num_layers):
        if layer not in pruned:
            both = model.layer(layer, torch.cat((x, y), 1), prompts.together, prompts.visible)
            x, y = both[:, :count], both[:, count:]
            continue
        begin = layer if layer in ends else begin
        key, value = _projected(model, layer, x, prompts.context, calibration)
        keys = Keys(*model.cache_entries(layer, key, value, prompts.context), prompts.context.positions)
        y = model.layer(layer, y, prompts.tail, prompts.visible[:, count:], keys)
        if layer == ends[begin] and begin in calibration.bypasses:
            x = x + calibration.bypasses[begin](x)
        x = model.hand_on(layer, x, prompts.context)
    return y


def _projected(
    model: LayerwiseModel, layer: int, x: Tensor, tokens: Tokens, calibration: Calibration
) -> tuple[Tensor, Tensor]:
    if layer not in calibration.projections:
        return model.project(layer, x, tokens)
    key, value = calibration.projections[layer](x).chunk(2, -1)
    return key, value
