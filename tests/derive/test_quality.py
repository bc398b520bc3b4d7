from __future__ import annotations

import numpy as np
import pytest

from steer_engine.derive.moments import auroc, explained_variance, held_out_auroc, mean_difference


def test_auroc_is_scikit_learns_and_counts_ties_half() -> None:
    from sklearn.metrics import roc_auc_score

    rng = np.random.default_rng(0)
    for _ in range(20):
        positive, negative = rng.integers(0, 9, 30).astype(float) + 1, rng.integers(0, 9, 20).astype(float)
        expected = roc_auc_score(np.repeat([1, 0], [30, 20]), np.concatenate([positive, negative]))
        assert auroc(positive, negative) == pytest.approx(expected, abs=1e-12)
    assert auroc(np.ones(3), np.ones(2)) == 0.5
    assert auroc(np.array([2.0]), np.array([1.0])) == 1.0
    assert auroc(np.array([1.0]), np.array([2.0])) == 0.0


def test_a_direction_is_judged_on_pairs_it_has_not_seen() -> None:
    rng = np.random.default_rng(1)
    noise = rng.normal(size=(2, 20, 500))
    # With far more dimensions than pairs any labels can be told apart in sight, and none out of sight.
    in_sight = mean_difference(noise[0], noise[1])
    assert auroc(noise[0] @ in_sight, noise[1] @ in_sight) > 0.99
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
