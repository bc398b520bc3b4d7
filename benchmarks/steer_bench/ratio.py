"""Ratios of interleaved runs: one per round, their median, and its confidence interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np

RESAMPLES = 10_000


class Verdict(StrEnum):
    MET = "met"
    MISSED = "missed"
    NOT_RESOLVED = "not resolved"


@dataclass(frozen=True, kw_only=True)
class Target:
    """Target of a ratio: a lower or an upper limit."""

    at_least: float | None = None
    at_most: float | None = None

    def __str__(self) -> str:
        return f"≥ {self.at_least:g}" if self.at_least is not None else f"≤ {self.at_most:g}"

    def verdict(self, low: float, high: float) -> Verdict:
        """Verdict for a confidence interval. If the target is inside it, the result is not resolved."""
        if self.at_least is not None:
            met, missed = low >= self.at_least, high < self.at_least
        else:
            assert self.at_most is not None
            met, missed = high <= self.at_most, low > self.at_most
        return Verdict.MET if met else Verdict.MISSED if missed else Verdict.NOT_RESOLVED


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Median over the rounds of ours / theirs, its 95 % bootstrap interval, the smallest and the largest ratio."""

    median: float
    low: float
    high: float
    smallest: float
    largest: float
    rounds: int

    @classmethod
    def of(cls, ours: Sequence[float], theirs: Sequence[float]) -> Ratio:
        """ours, theirs: one number per round, paired."""
        with np.errstate(divide="ignore", invalid="ignore"):
            ratios = np.asarray(ours, dtype=np.float64) / np.asarray(theirs, dtype=np.float64)
        if not np.isfinite(ratios).all():
            raise ValueError(f"A round has no finite ratio: {ratios.tolist()}.")
        drawn = np.random.default_rng(0).integers(0, len(ratios), (RESAMPLES, len(ratios)))
        low, high = np.quantile(np.median(ratios[drawn], axis=1), [0.025, 0.975])
        return cls(
            median=float(np.median(ratios)), low=float(low), high=float(high),
            smallest=float(ratios.min()), largest=float(ratios.max()), rounds=len(ratios),
        )  # fmt: skip

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"
