"""Each metric against a plain float64 computation by another way, and at its edges."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import special, stats

from steer_engine.evaluate.metrics import (
    choice_metrics,
    entropy_bits,
    exact_metrics,
    kl_divergence,
    normalised,
    shift_metrics,
)

VOCABULARY = 50_000
EPSILON = float(np.finfo(np.float64).eps)


@pytest.fixture(params=range(8))
def logits(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(request.param)
    base = random.normal(0, 4, VOCABULARY)
    return base, base + random.normal(0, request.param + 0.1, VOCABULARY)


def rounding(logits: np.ndarray) -> float:
    """Of a sum over the vocabulary of terms no larger than a log-probability, pairwise in NumPy: log2(V) roundings."""
    return 16 * EPSILON * float(np.ptp(logits)) * np.log2(VOCABULARY)


def test_against_scipy(logits: tuple[np.ndarray, np.ndarray]) -> None:
    base, steered = logits
    p, q = special.softmax(base), special.softmax(steered)
    bound = rounding(np.concatenate(logits))
    found = shift_metrics(normalised(steered), normalised(base))
    assert found["kl"] == pytest.approx(stats.entropy(p, q), abs=bound)
    assert found["entropy"] == pytest.approx(stats.entropy(q, base=2), abs=bound)
    assert found["top_changed"] == float(p.argmax() != q.argmax())
    assert found["kl"] > 1e6 * bound


def test_choices_against_plain_probabilities(logits: tuple[np.ndarray, np.ndarray]) -> None:
    _, steered = logits
    ids, correct = [7, 49_000, 123, 5], 2
    q = special.softmax(steered)
    wrong = [7, 49_000, 5]
    found = choice_metrics(normalised(steered), ids, correct)
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
    even = normalised(np.zeros(4))
    assert choice_metrics(even, [0, 1], 0)["accuracy"] == 0.0
    assert choice_metrics(even, [0, 1], 1)["accuracy"] == 0.0
    assert choice_metrics(normalised([1.0, 0, 0, 0]), [0, 1], 0)["accuracy"] == 1.0


def test_equal_distributions_differ_by_nothing(logits: tuple[np.ndarray, np.ndarray]) -> None:
    same = normalised(logits[0])
    assert shift_metrics(same, same) == {"kl": 0.0, "entropy": entropy_bits(same), "top_changed": 0.0}


def test_a_constant_added_to_logits_changes_nothing(logits: tuple[np.ndarray, np.ndarray]) -> None:
    moved = normalised(logits[0] + 300.0)
    assert kl_divergence(normalised(logits[0]), moved) < rounding(logits[0] + 300.0)


def test_entropy_of_known_distributions() -> None:
    assert entropy_bits(normalised(np.zeros(1024))) == pytest.approx(10.0, abs=1e-12)
    assert entropy_bits(np.array([0.0, -np.inf])) == 0.0


def test_tokens_without_probability() -> None:
    base = np.array([np.log(0.5), np.log(0.5), -np.inf])
    assert kl_divergence(base, np.log([0.25, 0.25, 0.5])) == pytest.approx(np.log(2.0))
    assert kl_divergence(base, np.array([0.0, -np.inf, -np.inf])) == np.inf
    assert choice_metrics(base, [0, 2], 0)["share_correct"] == 1.0


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
