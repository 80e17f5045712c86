"""Confidence intervals against distributions that are known exactly."""

from __future__ import annotations

import math
import random
import statistics

import numpy as np
import pytest

from popcompile.evaluation.bootstrap import estimate


def mean(x: np.ndarray) -> np.ndarray:
    return x.mean(-1)


@pytest.mark.parametrize(
    ("samples", "low", "high"),
    [
        # draws of n with replacement; the mean is the number of ones drawn, binomial(n, 1/n), over n
        ([0, 1], 0, 1),  # 1/4, 1/2, 1/4
        ([0, 0, 0, 4], 0, 3),  # P(4) = 1/256 < 0.025 < P(>= 3) = 13/256; P(0) = 81/256
        ([3, 3, 3], 3, 3),
    ],
)
def test_intervals_of_few_samples(samples: list[float], low: float, high: float) -> None:
    found = estimate(mean, samples, seed=0)
    assert found == {"value": statistics.fmean(samples), "low": low, "high": high}


def test_interval_of_many_samples_is_the_normal_one() -> None:
    draw = random.Random(0)
    samples = [draw.gauss(5, 2) for _ in range(1000)]
    found = estimate(mean, samples, seed=0)
    half = 1.96 * statistics.stdev(samples) / math.sqrt(len(samples))
    # 2000 resamples leave the ends of the interval an error of a few percent of its width
    assert found["low"] == pytest.approx(statistics.fmean(samples) - half, abs=0.15 * half)
    assert found["high"] == pytest.approx(statistics.fmean(samples) + half, abs=0.15 * half)


def test_the_seed_decides() -> None:
    samples = [float(i * i % 17) for i in range(20)]
    assert estimate(mean, samples, 3) == estimate(mean, samples, 3) != estimate(mean, samples, 4)


def test_one_sample_has_no_interval() -> None:
    assert estimate(mean, [2.5], 0) == {"value": 2.5, "low": None, "high": None}


def test_coverage() -> None:
    """Of intervals of 30 exponential samples, about 95% hold the mean (percentile intervals: somewhat fewer)."""
    draw = random.Random(1)
    found = [estimate(mean, [draw.expovariate(1) for _ in range(30)], seed) for seed in range(300)]
    share = sum(f["low"] <= 1 <= f["high"] for f in found) / len(found)
    assert 0.88 < share < 0.98
