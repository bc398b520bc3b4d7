"""How well a probe tells two classes of prompts apart, per block: AUROC with its interval, threshold, calibration.

Shape suffixes: N numbers, P prompts, R resamples, U different values.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from steer_engine.derive.condition import FEW_HELD_OUT, WEAK_AUROC, Cut, Indexes, Quality
from steer_engine.derive.fit import auroc
from steer_engine.derive.moments import Array
from steer_engine.probe import Platt
from steer_engine.vectors.metadata import ProbeAt, ProbeBlock

RESAMPLES = 2000
RESAMPLES_AT_ONCE = 200
CONFIDENCE = 0.95

BINS = 10
"""Bins of the expected calibration error, of equal width."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """Numbers of the prompts of one class at one block, and the prompt of each."""

    value_N: Array
    prompt_N: Indexes


@dataclass(frozen=True, kw_only=True, eq=False)
class BlockReport:
    """Quality of a probe at one block on prompts that it was not trained on.

    low, high: 95 % bootstrap interval of the AUROC, over prompts. quality: at the threshold; None without one.
    calibration_error: expected |probability - share of positives|; brier: mean squared error of the probability. None
    without a calibration.
    """

    probe: ProbeBlock
    positive: Scores
    negative: Scores
    auroc: float
    low: float
    high: float
    quality: Quality | None
    calibration_error: float | None
    brier: float | None


@dataclass(frozen=True, kw_only=True, eq=False)
class ProbeReport:
    """A probe's quality per block. num_positive, num_negative: prompts.

    best: the block that is best on other prompts than these, so that its AUROC here is not that of a lucky block.
    """

    by_block: Mapping[int, BlockReport]
    best: int
    at: ProbeAt
    num_positive: int
    num_negative: int
    notes: tuple[str, ...] = ()

    def warnings(self) -> list[str]:
        """One sentence per reason to trust the numbers less."""
        found = list(self.notes)
        count, area = self.num_positive + self.num_negative, self.by_block[self.best].auroc
        if count < FEW_HELD_OUT:
            found.append(
                f"the quality is measured on only {count} prompts, so its numbers are rough; give more prompts, "
                f"for example {2 * FEW_HELD_OUT} of each class."
            )
        if area < WEAK_AUROC:
            found.append(f"the AUROC of the best block is only {area:.3f}; expect many wrong decisions.")
        return found


def best_block(areas: Mapping[int, float | None]) -> int:
    """The block with the largest AUROC; of equal or unknown ones the first."""
    return max(areas, key=lambda block: areas[block] or 0.0)


def sigmoid(value_N: Array) -> Array:
    """1 / (1 + exp(-x)), without overflow."""
    result: Array = np.exp(-np.logaddexp(0.0, -value_N))
    return result


def probabilities(platt: Platt, value_N: Array) -> Array:
    """Calibrated probability of each number."""
    return sigmoid(platt.a * value_N + platt.b)


def report_block(probe: ProbeBlock, positive: Scores, negative: Scores, *, seed: int = 0) -> BlockReport:
    """Measure one block of a probe on numbers of prompts that it was not trained on. seed: of the bootstrap."""
    low, high = auroc_interval(positive, negative, seed=seed)
    quality = error = brier = None
    if probe.threshold is not None:
        cut = Cut(above=True, threshold=probe.threshold, f1=0.0, margin=0.0)
        quality = Quality.of(cut, positive.value_N, negative.value_N)
    if probe.platt is not None:
        share_N = probabilities(probe.platt, np.concatenate([positive.value_N, negative.value_N]))
        label_N = np.repeat([1.0, 0.0], [len(positive.value_N), len(negative.value_N)])
        error, brier = calibration_error(share_N, label_N), float(((share_N - label_N) ** 2).mean())
    return BlockReport(
        probe=probe,
        positive=positive,
        negative=negative,
        auroc=auroc(positive.value_N, negative.value_N),
        low=low,
        high=high,
        quality=quality,
        calibration_error=error,
        brier=brier,
    )


def binned(share_N: Array, label_N: Array, bins: int = BINS) -> list[tuple[float, float, int]]:
    """Mean probability, share of positives, and count of each bin of equal width that is not empty."""
    bin_N = np.minimum((share_N * bins).astype(int), bins - 1)
    return [
        (float(share_N[bin_N == each].mean()), float(label_N[bin_N == each].mean()), int((bin_N == each).sum()))
        for each in range(bins)
        if (bin_N == each).any()
    ]


def calibration_error(share_N: Array, label_N: Array) -> float:
    """Expected calibration error: mean |probability - share of positives| over the bins, weighted by their counts."""
    return sum(count * abs(mean - share) for mean, share, count in binned(share_N, label_N)) / len(share_N)


def auroc_interval(positive: Scores, negative: Scores, *, seed: int = 0) -> tuple[float, float]:
    """Bootstrap percentile interval of the AUROC. Prompts are drawn, of each class as many as there are."""
    rng = np.random.default_rng(seed)
    sides = (positive, negative)
    values, place = np.unique(np.concatenate([side.value_N for side in sides]), return_inverse=True)
    places = np.split(place, [len(positive.value_N)])
    areas: list[Array] = []
    for _ in range(RESAMPLES // RESAMPLES_AT_ONCE):
        weights = []
        for side, place_N in zip(sides, places, strict=True):
            num_prompts = int(side.prompt_N[-1]) + 1
            drawn_RP = rng.multinomial(num_prompts, np.full(num_prompts, 1.0 / num_prompts), RESAMPLES_AT_ONCE)
            weight_RU = np.zeros((RESAMPLES_AT_ONCE, len(values)))
            np.add.at(weight_RU.T, place_N, drawn_RP[:, side.prompt_N].T)
            weights.append(weight_RU)
        positive_RU, negative_RU = weights
        below_RU = np.cumsum(negative_RU, axis=1) - 0.5 * negative_RU
        total_R = positive_RU.sum(axis=1) * negative_RU.sum(axis=1)
        areas.append((positive_RU * below_RU).sum(axis=1) / total_R)
    low, high = np.quantile(np.concatenate(areas), [(1.0 - CONFIDENCE) / 2.0, (1.0 + CONFIDENCE) / 2.0])
    return float(low), float(high)
