from __future__ import annotations

import numpy as np
import pytest
from steer_bench.ratio import Ratio, Target, Verdict


def test_ratios_are_taken_within_each_round() -> None:
    """If the machine slows down during a run, both sides of a round slow down."""
    theirs = [100.0, 100.0, 50.0, 50.0, 50.0]
    ratio = Ratio.of([99.0, 99.0, 49.5, 49.5, 49.5], theirs)
    assert ratio.median == ratio.low == ratio.high == pytest.approx(0.99)
    assert ratio.rounds == 5


def test_the_interval_covers_the_true_ratio_in_95_percent_of_cases() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        ratio = Ratio.of(0.97 * np.exp(rng.normal(0, 0.03, 12)), np.ones(12))
        covered += ratio.low <= 0.97 <= ratio.high
    # A bootstrap of the median of 12 is a little too narrow or too wide, not by much: 4 sigma of a binomial.
    assert 0.95 - 4 * np.sqrt(0.95 * 0.05 / 200) <= covered / 200


def test_a_round_of_zero_seconds_is_an_error() -> None:
    with pytest.raises(ValueError, match="no finite ratio"):
        Ratio.of([1.0, 2.0], [1.0, 0.0])


@pytest.mark.parametrize(
    ("target", "low", "high", "verdict"),
    [
        (Target(at_least=0.97), 0.97, 1.0, Verdict.MET),
        (Target(at_least=0.97), 0.96, 0.98, Verdict.NOT_RESOLVED),
        (Target(at_least=0.97), 0.90, 0.96, Verdict.MISSED),
        (Target(at_most=1.05), 1.00, 1.05, Verdict.MET),
        (Target(at_most=1.05), 1.04, 1.06, Verdict.NOT_RESOLVED),
        (Target(at_most=1.05), 1.06, 1.10, Verdict.MISSED),
    ],
)
def test_verdicts(target: Target, low: float, high: float, verdict: Verdict) -> None:
    assert target.verdict(low, high) is verdict
