"""The metrics of an evaluation, as their definitions say."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

#: fp32 logits differ by up to 1e-3 (test_real_models.py), and mean differences of log-probabilities by no more
TOLERANCE = 1e-3


def metrics_of(full: list[Tensor], other: list[Tensor], answers: list[Tensor]) -> dict[str, float]:
    """Of one prompt's logits [tokens, vocabulary] per item."""
    kl, agreement, full_nll, nll = [], [], [], []
    for p, q, answer in zip(full, other, answers, strict=True):
        log_p, log_q = p.double().log_softmax(-1), q.double().log_softmax(-1)
        kl.append(F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1))
        agreement.append((p.argmax(-1) == q.argmax(-1)).double())
        full_nll.append(F.cross_entropy(p.double(), answer))
        nll.append(F.cross_entropy(q.double(), answer))
    first = [float(k[0]) for k in kl]
    full_mean, mean = (float(torch.stack(n).mean()) for n in (full_nll, nll))
    return {
        "first_token_kl_mean": float(np.mean(first)),
        "first_token_kl_p95": float(np.percentile(first, 95)),
        "continuation_kl_mean": float(torch.cat([k[1:] for k in kl]).mean()),
        "top1_agreement": float(torch.cat(agreement).mean()),
        "full_perplexity": math.exp(full_mean),
        "pop_perplexity": math.exp(mean),
        "perplexity_ratio": math.exp(mean - full_mean),
    }


def assert_metrics(found: dict[str, Any], wanted: dict[str, float], tolerance: float = TOLERANCE) -> None:
    for name, value in wanted.items():
        estimated = found[name]
        assert estimated["value"] == pytest.approx(value, rel=tolerance, abs=tolerance), name
        if estimated["low"] is not None:
            assert estimated["low"] <= estimated["value"] <= estimated["high"]
