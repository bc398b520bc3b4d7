"""Each metric equals a direct float64 computation, also in edge cases."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special

from steer_engine.evaluate.statistics import choice_metrics, exact_metrics, shift_metrics

VOCABULARY = 50_000
EPSILON = float(np.finfo(np.float64).eps)


@pytest.fixture(params=range(8))
def steered(request: pytest.FixtureRequest) -> np.ndarray:
    """Logits."""
    return np.random.default_rng(request.param).normal(0, request.param + 4, VOCABULARY)


def rounding(logits: np.ndarray) -> float:
    """Rounding error of a pairwise sum over the vocabulary: log2(V) roundings of terms up to a log-probability."""
    return 16 * EPSILON * float(np.ptp(logits)) * np.log2(VOCABULARY)


def test_choice_metrics_equal_direct_computations(steered: np.ndarray) -> None:
    ids, correct = [7, 49_000, 123, 5], 2
    q = special.softmax(steered)
    wrong = [7, 49_000, 5]
    found = choice_metrics(special.log_softmax(steered)[ids], correct)
    bound = rounding(steered)
    assert found["mass_correct"] == pytest.approx(q[123], rel=bound)
    assert found["mass_incorrect"] == pytest.approx(q[wrong].sum(), rel=bound)
    assert found["logp_correct"] == pytest.approx(np.log(q[123]), abs=bound)
    assert found["logp_incorrect"] == pytest.approx(np.log(q[wrong].sum()), abs=bound)
    assert found["share_correct"] == pytest.approx(q[123] / q[ids].sum(), rel=bound)
    assert found["share_incorrect"] == pytest.approx(q[wrong].sum() / q[ids].sum(), rel=bound)
    assert found["margin"] == pytest.approx(steered[123] - steered[wrong].max(), abs=bound)
    assert found["accuracy"] == float(steered[123] > steered[wrong].max())


def test_a_tie_is_not_right() -> None:
    even = np.log([0.25, 0.25])
    assert choice_metrics(even, 0)["accuracy"] == 0.0
    assert choice_metrics(even, 1)["accuracy"] == 0.0
    assert choice_metrics(np.log([0.3, 0.25]), 0)["accuracy"] == 1.0


def test_an_answer_with_probability_zero() -> None:
    assert choice_metrics([np.log(0.5), -np.inf], 0)["share_correct"] == 1.0


def test_entropy_is_in_bits() -> None:
    assert shift_metrics(0.5, np.log(1024), True) == {"kl": 0.5, "entropy": pytest.approx(10.0), "top_changed": 1.0}


@pytest.mark.parametrize(
    ("text", "target", "right"),
    [
        (" 42", "42", 1.0),
        (" 42. So", " 42", 1.0),
        ("421", "42", 0.0),
        ("x 42", "42", 0.0),
        ("", "42", 0.0),
        ("Paris, France", " Paris", 1.0),
        ("Parisian", " Paris", 0.0),
    ],
)
def test_exact_match(text: str, target: str, right: float) -> None:
    assert exact_metrics(text, target, 3)["accuracy"] == right


def test_distinct_words_and_length() -> None:
    found = exact_metrics("a b a b", "c", 4)
    assert (found["distinct"], found["length"]) == (0.5, 4.0)
    assert exact_metrics("", "c", 0)["distinct"] == 0.0
