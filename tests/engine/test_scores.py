"""Numbers about distributions against SciPy in float64, and what belongs to whom."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import special, stats

from steer_engine.engine.outputs import Scores, divergence, entropy
from steer_engine.program import Program, Score

VOCABULARY = 50_000
EPSILON = float(np.finfo(np.float64).eps)


@pytest.fixture(params=range(8))
def logits(request: pytest.FixtureRequest) -> tuple[np.ndarray, np.ndarray]:
    """Of a baseline, and of another distribution."""
    random = np.random.default_rng(request.param)
    base = random.normal(0, 4, VOCABULARY)
    return base, base + random.normal(0, request.param + 0.1, VOCABULARY)


def rounding(logits: np.ndarray) -> float:
    """Of a sum over the vocabulary of terms no larger than a log-probability, pairwise: log2(V) roundings."""
    return float(16 * EPSILON * np.ptp(logits) * np.log2(VOCABULARY))


def requested(key: str, baseline: str = "plain", answers: tuple[int, ...] = ()) -> Score:
    return Score(key=key, baseline=baseline, answers=answers)


def reduced(scores: Scores, logits: dict[Score, np.ndarray]) -> None:
    """One step."""
    scores.plan(dict(enumerate(logits)))
    scores.reduce(torch.from_numpy(np.stack(list(logits.values()))))


def test_against_scipy(logits: tuple[np.ndarray, np.ndarray]) -> None:
    base, steered = logits
    p, q = special.softmax(base), special.softmax(steered)
    bound = rounding(np.concatenate(logits))
    scores = Scores()
    reduced(scores, {requested("a", answers=(7, 49_000)): steered, requested("plain"): base})
    found, plain = scores.take(["a", "plain"])
    assert found is not None
    assert plain is not None
    assert found["kl"] == pytest.approx(stats.entropy(p, q), abs=bound)
    assert found["entropy"] == pytest.approx(stats.entropy(q), abs=bound)
    assert found["top_changed"] == (p.argmax() != q.argmax())
    assert found["answers"] == pytest.approx(np.log(q[[7, 49_000]]), abs=bound)
    assert found["kl"] > 1e6 * bound
    assert (plain["kl"], plain["top_changed"], plain["answers"]) == (0.0, False, [])


def test_float32_logits_are_reduced_in_float64(logits: tuple[np.ndarray, np.ndarray]) -> None:
    base, steered = (row.astype(np.float32) for row in logits)
    scores = Scores()
    reduced(scores, {requested("plain"): base, requested("a"): steered})
    (found,) = scores.take(["a"])
    assert found is not None
    exact = stats.entropy(special.softmax(base.astype(np.float64)), special.softmax(steered.astype(np.float64)))
    assert found["kl"] == pytest.approx(exact, abs=rounding(np.concatenate(logits)))


def test_a_baseline_serves_later_steps_until_it_is_taken() -> None:
    scores = Scores()
    row = np.arange(8.0)
    reduced(scores, {requested("plain"): row})
    reduced(scores, {requested("a"): row[::-1].copy()})
    assert scores.take(["plain"])[0] is not None
    reduced(scores, {requested("b"): row})
    first, second = scores.take(["a", "b"])
    assert first is not None
    assert first["kl"] > 1
    assert second is None
    assert scores.take(["a"]) == [None]


def test_each_row_is_compared_with_its_own_baseline() -> None:
    scores = Scores()
    up, down = np.arange(8.0), np.arange(8.0)[::-1].copy()
    rows = {requested("p", "p"): up, requested("q", "q"): down, requested("a", "p"): up, requested("b", "q"): up}
    reduced(scores, rows)
    of_p, of_q = scores.take(["a", "b"])
    assert of_p is not None
    assert of_q is not None
    assert of_p["kl"] == 0.0
    assert of_q["kl"] > 1


def test_nothing_is_asked_of_a_step_that_was_not_planned() -> None:
    scores = Scores()
    scores.plan({3: requested("plain")})
    assert scores.rows == [3]
    scores.plan({})
    scores.reduce(torch.zeros(0, 8))
    assert scores.take(["plain"]) == [None]


def test_a_constant_added_to_logits_changes_nothing(logits: tuple[np.ndarray, np.ndarray]) -> None:
    scores = Scores()
    reduced(scores, {requested("plain"): logits[0], requested("a"): logits[0] + 300.0})
    (found,) = scores.take(["a"])
    assert found is not None
    assert found["kl"] < rounding(logits[0] + 300.0)


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([probabilities], dtype=torch.float64).log()


def test_tokens_without_probability() -> None:
    base = logs(0.5, 0.5, 0.0)
    assert divergence(base, logs(0.25, 0.25, 0.5)).item() == pytest.approx(math.log(2.0))
    assert divergence(base, logs(1.0, 0.0, 0.0)).item() == math.inf
    assert entropy(base).item() == pytest.approx(math.log(2.0))
    assert entropy(logs(*[1 / 1024] * 1024)).item() == pytest.approx(math.log(1024))


def test_what_is_not_finite_stays_so() -> None:
    scores = Scores()
    reduced(scores, {requested("plain"): np.zeros(4), requested("a"): np.array([np.nan, 0.0, 0.0, 0.0])})
    (found,) = scores.take(["a"])
    assert found is not None
    assert math.isnan(float(str(found["kl"])))


def test_a_baseline_that_is_not_finite_is_no_zero() -> None:
    scores = Scores()
    reduced(scores, {requested("plain"): np.array([np.nan, 0.0, 0.0, 0.0]), requested("a"): np.zeros(4)})
    (found,) = scores.take(["a"])
    assert found is not None
    assert math.isnan(float(str(found["kl"])))


def test_a_baseline_keeps_no_more_than_itself() -> None:
    scores = Scores()
    reduced(scores, {requested("plain"): np.zeros(64), **{requested(f"a{n}"): np.zeros(64) for n in range(15)}})
    assert scores._baseline_V["plain"].untyped_storage().nbytes() == 64 * 8


def test_on_the_wire() -> None:
    program = Program(score=requested("a", answers=(3, 4)))
    assert Program.from_wire(program.to_wire()) == program
