"""Confidence intervals by the percentile bootstrap (Efron and Tibshirani 1993, chapter 13)."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from popcompile.package.evaluation import Estimate

CONFIDENCE = 0.95
RESAMPLES = 2000

#: maps samples [..., n] to one number per leading index, [...]
Statistic = Callable[[NDArray[np.float64]], NDArray[np.float64]]


def estimate(statistic: Statistic, samples: list[float], seed: int) -> Estimate:
    """A statistic of `samples`, one per prompt, and its confidence interval.

    Prompts are resampled, so tokens of one prompt stay together, and a statistic of differences is a paired one. The
    same seed draws the same prompts for every statistic. One sample has no interval: low and high are None.
    """
    values = np.asarray(samples, dtype=np.float64)
    estimated: Estimate = {"value": float(statistic(values)), "low": None, "high": None}
    if len(values) > 1:
        drawn = np.random.default_rng(seed).integers(len(values), size=(RESAMPLES, len(values)))
        tail = (1 - CONFIDENCE) / 2
        low, high = np.quantile(statistic(values[drawn]), [tail, 1 - tail])
        estimated["low"], estimated["high"] = float(low), float(high)
    return estimated
