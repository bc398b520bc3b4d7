"""Intervals and tests for paired measurements: the same items, steered and not. float64.

Shape suffixes: N items, R resamples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from steer_engine.evaluate.metrics import Array

RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 1 << 22
"""Random numbers at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean and its bootstrap percentile interval."""

    mean: float
    low: float
    high: float


def bootstrap(value_N: Array, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Mean of per-item numbers, with the percentile interval over resampled items. For a paired difference give the
    differences.
    """
    count = len(value_N)
    random = np.random.default_rng(seed)
    means: list[Array] = []
    left = resamples
    while left:
        rows = min(left, max(1, CHUNK // count))
        means.append(value_N[random.integers(0, count, (rows, count))].mean(axis=1))
        left -= rows
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=float(value_N.mean()), low=float(low), high=float(high))


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """Steered against unsteered on the same items.

    gained, lost: items that became right, and that became wrong. p: McNemar's exact test, two-sided.
    """

    before: float
    after: float
    difference: Interval
    gained: int
    lost: int
    p: float


def compare(before_N: Array, after_N: Array, *, seed: int = 0) -> Paired:
    """Accuracy before and after, from 0/1 per item, in the same order."""
    gained = int(((after_N == 1.0) & (before_N == 0.0)).sum())
    lost = int(((after_N == 0.0) & (before_N == 1.0)).sum())
    return Paired(
        before=float(before_N.mean()),
        after=float(after_N.mean()),
        difference=bootstrap(after_N - before_N, seed=seed),
        gained=gained,
        lost=lost,
        p=mcnemar(gained, lost),
    )


def mcnemar(gained: int, lost: int) -> float:
    """Probability of a split of the changed items at least as uneven, if each change were a coin's toss (exact)."""
    from scipy.stats import binomtest

    return 1.0 if gained + lost == 0 else float(binomtest(gained, gained + lost, 0.5).pvalue)


def holm(p_by_name: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number by Holm's step-down method; the order of the names is kept."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, (name, p) in enumerate(sorted(p_by_name.items(), key=lambda entry: entry[1])):
        highest = max(highest, min(1.0, (len(p_by_name) - rank) * p))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_by_name}


def slope(alphas: Array, values: Array) -> float:
    """Least-squares slope of a mean against strength: for `margin` the vector's steerability, in nats per unit."""
    centred = alphas - alphas.mean()
    return float(centred @ (values - values.mean()) / (centred @ centred))
