"""Intervals have their nominal coverage, and p-values are uniform without an effect."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from steer_engine.evaluate.statistics import bootstrap, compare, holm, mcnemar, slope


def test_mcnemar_is_the_sign_test_of_the_changed_items() -> None:
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(5, 5) == 1.0
    assert mcnemar(10, 0) == pytest.approx(2 * 0.5**10)
    assert mcnemar(3, 12) == mcnemar(12, 3) == pytest.approx(2 * stats.binom.cdf(3, 15, 0.5))


def test_under_a_true_null_p_is_uniform() -> None:
    """Steered and unsteered results are swapped at random per item, which removes any effect."""
    random = np.random.default_rng(0)
    plain = random.random(4000) < 0.6
    steered = np.where(random.random(4000) < 0.5, random.random(4000) < 0.9, plain)  # a large effect
    assert compare(plain.astype(float), steered.astype(float)).p < 1e-6
    found = []
    for _ in range(200):
        swap = random.random(4000) < 0.5
        before, after = np.where(swap, steered, plain), np.where(swap, plain, steered)
        gained, lost = int((after & ~before).sum()), int((before & ~after).sum())
        found.append(mcnemar(gained, lost))
    assert stats.kstest(found, "uniform").pvalue > 0.001
    # Below 0.05, which a report calls significant. Margin: five standard deviations of a fair count.
    assert np.mean(np.array(found) < 0.05) < 0.05 + 5 * (0.05 * 0.95 / 200) ** 0.5


def test_the_interval_has_its_nominal_coverage() -> None:
    random = np.random.default_rng(1)
    hits = 0
    for trial in range(300):
        differences = random.choice([-1.0, 0.0, 1.0], p=[0.1, 0.7, 0.2], size=300)
        interval = bootstrap(differences, seed=trial, resamples=1000)
        hits += interval.low <= 0.1 <= interval.high
    assert abs(hits / 300 - 0.95) < 4 * (0.95 * 0.05 / 300) ** 0.5


def test_bootstrap_equals_scipy_and_is_reproducible() -> None:
    values = np.random.default_rng(2).normal(1.0, 2.0, 400)
    mine = bootstrap(values, seed=5)
    theirs = stats.bootstrap((values,), np.mean, method="percentile", n_resamples=10_000, rng=6).confidence_interval
    noise = 5 * values.std() / 400**0.5 / 10_000**0.5 * 3  # of a quantile of 10,000 resamples
    assert (mine.low, mine.high) == (pytest.approx(theirs.low, abs=noise), pytest.approx(theirs.high, abs=noise))
    assert mine == bootstrap(values, seed=5) != bootstrap(values, seed=6)
    assert mine.mean == values.mean()


def test_compare_counts_changes() -> None:
    before, after = np.array([1.0, 1, 0, 0, 0]), np.array([1.0, 0, 1, 1, 0])
    paired = compare(before, after)
    assert (paired.gained, paired.lost) == (2, 1)
    assert (paired.before, paired.after) == (0.4, 0.6)
    assert paired.difference.mean == pytest.approx(0.2)


def test_holm_by_hand() -> None:
    corrected = holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert corrected == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert list(corrected) == ["a", "b", "c", "d"]
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


def test_slope() -> None:
    alphas = np.array([-2.0, 0.0, 1.0, 4.0])
    assert slope(alphas, 3.0 - 0.5 * alphas) == pytest.approx(-0.5)
