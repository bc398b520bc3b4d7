from __future__ import annotations

import numpy as np
import pytest

from steer_engine.derive.moments import Moments, Sample, summarise
from steer_engine.errors import DerivationError

LTD = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)


def test_a_text_is_the_mean_of_its_rows_and_their_norms() -> None:
    sample = summarise(LTD, skip_first=False)
    assert np.array_equal(sample.row_LD, LTD.astype(np.float64).mean(axis=1))
    assert np.array_equal(sample.norm_L, np.linalg.norm(LTD.astype(np.float64), axis=2).sum(axis=1))
    assert sample.norm_count == 5
    assert sample.row_LD.dtype == np.float64


def test_the_first_token_counts_in_the_mean_but_not_in_the_norm() -> None:
    rows = LTD.copy()
    rows[:, 0] *= 1000
    sample = summarise(rows, skip_first=True)
    assert np.array_equal(sample.row_LD, rows.astype(np.float64).mean(axis=1))
    assert np.array_equal(sample.norm_L, np.linalg.norm(rows[:, 1:].astype(np.float64), axis=2).sum(axis=1))
    assert sample.norm_count == 4
    only = summarise(rows[:, :1], skip_first=True)
    assert only.norm_count == 1
    assert only.norm_L[0] == pytest.approx(np.linalg.norm(rows[0, 0].astype(np.float64)))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_is_not_finite_is_refused(bad: float) -> None:
    rows = LTD.copy()
    rows[1, 2, 0] = bad
    with pytest.raises(DerivationError, match="not finite"):
        summarise(rows, skip_first=True)


def samples(count: int) -> list[Sample]:
    rng = np.random.default_rng(1)
    return [summarise(rng.normal(size=(2, 4, 3)).astype(np.float32), skip_first=False) for _ in range(count)]


def test_moments_add_up() -> None:
    parts = samples(10)
    whole = Moments.of(parts[:4]) + Moments.of(parts[4:])
    assert whole.count == 10
    assert whole.norm_count == 40
    expected = np.stack([part.row_LD for part in parts])
    # A sum of 10 float64 terms, ten roundings.
    assert np.abs(whole.mean_LD - expected.mean(axis=0)).max() <= 10 * 2**-52 * np.abs(expected).max()
    assert np.allclose(whole.norm_L, sum(part.norm_L for part in parts), rtol=20 * 2**-52, atol=0)
    zero = Moments.zero(2, 3) + whole
    assert np.array_equal(zero.sum_LD, whole.sum_LD)
