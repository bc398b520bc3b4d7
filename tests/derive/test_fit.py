from __future__ import annotations

import itertools

import numpy as np
import pytest

from steer_engine.derive.activations import Reading
from steer_engine.derive.fit import Readings, fit
from steer_engine.derive.methods import METHODS
from steer_engine.derive.moments import Moments, summarise
from steer_engine.errors import DerivationError

BLOCKS = (4, 9)


def reading(index: int, positive: np.ndarray, negative: np.ndarray) -> Reading:
    """A chunk as an engine gives it; rows are [N, L, D]."""
    moments = [
        Moments.of([summarise(row[:, None], skip_first=False) for row in side.astype(np.float32)])
        for side in (positive, negative)
    ]
    return Reading(
        index=index,
        positive=moments[0],
        negative=moments[1],
        positive_NLD=positive.astype(np.float32),
        negative_NLD=negative.astype(np.float32),
    )


def data(num_pairs: int = 30) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(3)
    base = rng.normal(size=(num_pairs, 2, 8)).astype(np.float32)
    return base + rng.normal(size=(2, 8)).astype(np.float32), base


def merged(positive: np.ndarray, negative: np.ndarray, size: int) -> Readings:
    readings = Readings()
    for index, begin in enumerate(range(0, len(positive), size)):
        readings.add(reading(index, positive[begin : begin + size], negative[begin : begin + size]))
    return readings


@pytest.mark.parametrize("method", METHODS)
def test_every_method_gives_a_direction_and_a_norm_per_block(method: str) -> None:
    positive, negative = data()
    fitted = fit(merged(positive, negative, 7), method, BLOCKS)
    assert tuple(fitted.directions) == BLOCKS
    assert {v.dtype for v in fitted.directions.values()} == {np.dtype(np.float32)}
    both = np.concatenate([positive, negative]).astype(np.float64)
    expected = np.linalg.norm(both, axis=2).mean(axis=0)
    assert [fitted.residual_norms[block] for block in BLOCKS] == pytest.approx(list(expected), rel=1e-12)
    assert tuple(fitted.separation) == (() if method == "mean" else BLOCKS)
    assert all(area > 0.5 for area in fitted.separation.values())
    differences = positive.astype(np.float32).astype(np.float64) - negative.astype(np.float32)
    for place, block in enumerate(BLOCKS):
        unit = fitted.directions[block] / np.linalg.norm(fitted.directions[block])
        share = ((differences[:, place] @ unit) ** 2).sum() / (differences[:, place] ** 2).sum()
        assert fitted.explained[block] == pytest.approx(share, rel=1e-5)


def test_diffmean_against_numpy() -> None:
    positive, negative = data()
    directions = fit(merged(positive, negative, 7), "diffmean", BLOCKS).directions
    expected = (positive.astype(np.float64) - negative).mean(axis=0).astype(np.float32)
    assert np.abs(np.stack([*directions.values()]) - expected).max() <= 2**-23 * np.abs(expected).max()


def test_chunks_must_come_in_order() -> None:
    positive, negative = data(2)
    readings = Readings()
    with pytest.raises(AssertionError, match="chunk 1 came where 0 was due"):
        readings.add(reading(1, positive, negative))


@pytest.mark.parametrize("method", METHODS)
def test_no_difference_is_an_error_that_names_the_blocks(method: str) -> None:
    positive, negative = data()
    positive[:, 1] = negative[:, 1]
    # The same texts on both sides, in another order: sums differ by rounding at most.
    if method not in ("mean", "pca", "pca_centred"):
        positive[:, 1] = np.roll(negative[:, 1], 1, axis=0)
    if method == "mean":
        positive[:, 1] = 0.0
    with pytest.raises(DerivationError, match=r"do not differ at block\(s\) 9: the direction there is zero"):
        fit(merged(positive, negative, 7), method, BLOCKS)


def test_sums_do_not_depend_on_who_read_what() -> None:
    positive, negative = data()
    chunks = [reading(i, positive[b : b + 7], negative[b : b + 7]) for i, b in enumerate(range(0, 30, 7))]
    results = set()
    for order in itertools.islice(itertools.permutations(chunks), 5):
        readings = Readings()
        for chunk in sorted(order, key=lambda c: c.index):
            readings.add(chunk)
        results.add(b"".join(v.tobytes() for v in fit(readings, "diffmean", BLOCKS).directions.values()))
    assert len(results) == 1
