"""Compare what two models predict for the same tokens."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: rows of logits that are compared at once
_ROWS = 8


class Comparison(NamedTuple):
    """A number per prediction, float64: KL(full || other) and each model's negative log-likelihood of the token that
    came, in nats; agreement, 1 where both hold the same token for the most likely one; and for each model, 1 where that
    is the token that came.
    """

    kl: Tensor
    full_nll: Tensor
    nll: Tensor
    agreement: Tensor
    full_correct: Tensor
    correct: Tensor


def compare(full: Tensor, other: Tensor, tokens: Tensor) -> Comparison:
    """Compare two logits [tokens, vocabulary] that predict `tokens` [tokens]."""
    parts = []
    for one, two, following in zip(full.split(_ROWS), other.split(_ROWS), tokens.split(_ROWS), strict=True):
        log_p, log_q = (torch.log_softmax(t.float(), dim=-1) for t in (one, two))
        kl = (log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64).clamp(min=0)
        losses = [-t.gather(1, following[:, None])[:, 0].double() for t in (log_p, log_q)]
        first, second = one.argmax(-1), two.argmax(-1)
        same = [(a == b).double() for a, b in ((first, second), (first, following), (second, following))]
        parts.append((kl, *losses, *same))
    return Comparison(*map(torch.cat, zip(*parts, strict=True)))
