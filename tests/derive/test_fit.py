"""The fitter: sums of rows, directions per block, and quality numbers."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from steer_engine.derive.fit import CapturedRows, auroc, explained_variance, held_out_auroc
from steer_engine.derive.methods import METHODS, mean_difference
from steer_engine.derive.moments import Chunk, Moments, Sample, summarise
from steer_engine.errors import DerivationError
from steer_engine.vectors import VectorMetadata

BLOCKS = (4, 9)
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
def test_rows_that_are_not_finite_are_refused(bad: float) -> None:
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


def data(num_pairs: int = 30) -> tuple[np.ndarray, np.ndarray]:
    """Positive and negative rows `[N, L, D]`."""
    rng = np.random.default_rng(3)
    base = rng.normal(size=(num_pairs, 2, 8)).astype(np.float32)
    return base + rng.normal(size=(2, 8)).astype(np.float32), base


def captured(positive: np.ndarray, negative: np.ndarray, size: int = 7) -> CapturedRows:
    """The rows in chunks of `size` pairs, as an engine sends them."""
    rows = CapturedRows()
    for begin in range(0, len(positive), size):
        sides = [
            [summarise(row[:, None], skip_first=False) for row in side[begin : begin + size].astype(np.float32)]
            for side in (positive, negative)
        ]
        rows.add(Chunk.of(sides[0], sides[1], keep_rows=True))
    return rows


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_direction_and_a_norm_per_block(method: str) -> None:
    positive, negative = data()
    vector = captured(positive, negative).fit(method, BLOCKS, VectorMetadata(method=method))
    about = vector.metadata
    assert (vector.blocks, about.method) == (BLOCKS, method)
    assert {v.dtype for v in vector.directions.values()} == {np.dtype(np.float32)}
    both = np.concatenate([positive, negative]).astype(np.float64)
    expected = np.linalg.norm(both, axis=2).mean(axis=0)
    assert [about.residual_norms[block] for block in BLOCKS] == pytest.approx(list(expected), rel=1e-12)
    assert tuple(about.separation) == (() if method == "mean" else BLOCKS)
    assert all(area > 0.5 for area in about.separation.values())
    differences = positive.astype(np.float32).astype(np.float64) - negative.astype(np.float32)
    for index, block in enumerate(BLOCKS):
        unit = vector.directions[block] / np.linalg.norm(vector.directions[block])
        share = ((differences[:, index] @ unit) ** 2).sum() / (differences[:, index] ** 2).sum()
        assert about.explained_variance[block] == pytest.approx(share, rel=1e-5)


def test_diffmean_against_numpy() -> None:
    positive, negative = data()
    directions = captured(positive, negative).fit("diffmean", BLOCKS, VectorMetadata()).directions
    expected = (positive.astype(np.float64) - negative).mean(axis=0).astype(np.float32)
    assert np.abs(np.stack([*directions.values()]) - expected).max() <= 2**-23 * np.abs(expected).max()


@pytest.mark.parametrize("method", METHODS)
def test_no_difference_is_an_error_that_names_the_blocks(method: str) -> None:
    positive, negative = data()
    positive[:, 1] = negative[:, 1]
    # The same texts on both sides, in another order: sums differ by rounding at most.
    if method not in ("mean", "pca", "pca_centred"):
        positive[:, 1] = np.roll(negative[:, 1], 1, axis=0)
    if method == "mean":
        positive[:, 1] = 0.0
    with pytest.raises(DerivationError, match=r"do not differ at block\(s\) 9: the direction is zero"):
        captured(positive, negative).fit(method, BLOCKS, VectorMetadata())


def test_without_rows_there_is_a_direction_but_no_quality() -> None:
    positive, negative = ([summarise(row[:, None], skip_first=False) for row in side] for side in data())
    rows = CapturedRows()
    rows.add(Chunk.of(positive, negative, keep_rows=False))
    about = rows.fit("diffmean", BLOCKS, VectorMetadata()).metadata
    assert tuple(about.residual_norms) == BLOCKS
    assert not about.separation
    assert not about.explained_variance


def test_auroc_equals_that_of_scikit_learn_and_counts_ties_half() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        positive, negative = rng.integers(0, 9, 30).astype(float) + 1, rng.integers(0, 9, 20).astype(float)
        expected = roc_auc_score(np.repeat([1, 0], [30, 20]), np.concatenate([positive, negative]))
        assert auroc(positive, negative) == pytest.approx(expected, abs=1e-12)
    assert auroc(np.ones(3), np.ones(2)) == 0.5
    assert auroc(np.array([2.0]), np.array([1.0])) == 1.0
    assert auroc(np.array([1.0]), np.array([2.0])) == 0.0


def test_auroc_is_measured_on_held_out_pairs() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(2, 20, 500))
    # With far more dimensions than pairs, any labels are separable on the fitted pairs, and none on others.
    fitted = mean_difference(noise[0], noise[1])
    assert auroc(noise[0] @ fitted, noise[1] @ fitted) > 0.99
    held_out = held_out_auroc(noise[0], noise[1], mean_difference)
    assert held_out is not None
    assert 0.3 < held_out < 0.7
    real = held_out_auroc(noise[0] + 1.0, noise[1], mean_difference)
    assert real == 1.0


def test_too_few_pairs_give_no_number() -> None:
    rows = np.random.default_rng(2).normal(size=(2, 10, 3))
    assert held_out_auroc(rows[0], rows[1], mean_difference) is not None
    assert held_out_auroc(rows[0, :9], rows[1, :9], mean_difference) is None


def test_explained_variance_is_the_share_along_the_direction() -> None:
    differences = np.array([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0]])
    groups = [differences[:2], differences[2:]]
    assert explained_variance(groups, np.array([5.0, 0.0])) == pytest.approx(18 / 19)
    assert explained_variance(groups, np.array([0.0, -0.1])) == pytest.approx(1 / 19)
    assert explained_variance([differences[:2]], np.array([0.3, 0.0])) == pytest.approx(1.0)
    assert explained_variance(groups, np.zeros(2)) is None
    assert explained_variance([np.zeros((2, 2))], np.ones(2)) is None
