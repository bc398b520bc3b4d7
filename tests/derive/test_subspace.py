from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from steer_engine.derive.methods import MAX_PASSES, top_direction


def rows(num: int, width: int, ratio: float) -> np.ndarray:
    """Rows with a first eigenvalue that is `ratio` times the second, and a slow decay behind them."""
    rng = np.random.default_rng(1)
    rank = min(num, width)
    left, _ = np.linalg.qr(rng.normal(size=(num, rank)))
    right, _ = np.linalg.qr(rng.normal(size=(width, rank)))
    values = np.sqrt(np.concatenate([[ratio], np.linspace(1.0, 0.2, rank - 1)]))
    return (left * values) @ right.T


@pytest.mark.parametrize(("num", "width"), [(300, 40), (30, 400), (5, 3), (3, 5), (1, 4)])
def test_it_is_the_first_singular_vector(num: int, width: int) -> None:
    matrix = rows(num, width, 1.1)
    _, values, vectors = np.linalg.svd(matrix, full_matrices=False)
    found, value = top_direction(lambda: iter(np.array_split(matrix, 3)), np.zeros(width))
    assert abs(found @ vectors[0]) > 1 - 1e-7
    assert value == pytest.approx(values[0] ** 2, rel=1e-9)
    assert np.linalg.norm(found) == pytest.approx(1.0, rel=1e-12)


def test_it_passes_over_the_rows_a_few_times() -> None:
    matrix = rows(500, 60, 4.0)
    passes = 0

    def groups() -> Iterator[np.ndarray]:
        nonlocal passes
        passes += 1
        yield from np.array_split(matrix, 7)

    top_direction(groups, np.zeros(60))
    assert 2 <= passes < 20 < MAX_PASSES


def test_nothing_has_no_direction() -> None:
    found, value = top_direction(lambda: iter([np.zeros((4, 6))]), np.zeros(6))
    assert value == 0.0
    assert not found.any()
