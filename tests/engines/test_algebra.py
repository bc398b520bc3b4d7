"""Invariant 4: specs that mean the same give the same."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.driving import edit, score, steering, tokens
from helpers.engines import random_vector

from steer_engine import LLM

PROMPT = tokens(1, 24)


@pytest.fixture(params=["tiny", pytest.param("tiny_compiled", marks=pytest.mark.v1_only)])
def llm(request: pytest.FixtureRequest) -> LLM:
    """An engine that knows v, 20*v, -v, w and v + w under names of their own."""
    engine: LLM = request.getfixturevalue(request.param)
    v, w = random_vector(100), random_vector(101)
    for name, vector in {"v": v, "v20": v * 20.0, "minus_v": -v, "w": w, "v_plus_w": v + w}.items():
        engine.vectors.add(name, vector)
    return engine


def logprobs(llm: LLM, *edits: dict[str, object]) -> np.ndarray:
    llm.llm_engine.reset_prefix_cache()
    return score(llm, [PROMPT], [steering(*edits) if edits else None])[0]


def bound(reference: np.ndarray) -> float:
    """A few float32 roundings of the edited stream, carried through three blocks."""
    return 64 * float(np.finfo(np.float32).eps) * float(np.abs(reference).max())


def test_nothing_is_nothing(llm: LLM) -> None:
    plain = logprobs(llm)
    np.testing.assert_array_equal(logprobs(llm, edit("v", 0.0)), plain)
    np.testing.assert_array_equal(logprobs(llm, edit("v", 1.3), edit("v", -1.3)), plain)
    np.testing.assert_array_equal(logprobs(llm, edit("v", 1.3, scope={"start": 5, "end": 5})), plain)
    cancelled = logprobs(llm, edit("v", 1.3), edit("minus_v", 1.3))
    assert np.abs(cancelled - plain).max() <= bound(plain)
    assert np.abs(logprobs(llm, edit("v", 1.3)) - plain).max() >= 100 * bound(plain)


def test_scale_and_vector_are_one_product(llm: LLM) -> None:
    reference = logprobs(llm, edit("v", 20.0))
    assert np.abs(logprobs(llm, edit("v20", 1.0)) - reference).max() <= bound(reference)
    assert np.abs(logprobs(llm, edit("minus_v", -20.0)) - reference).max() <= bound(reference)
    np.testing.assert_array_equal(logprobs(llm, edit("v", 12.0), edit("v", 8.0)), reference)
    assert np.abs(reference - logprobs(llm)).max() >= 100 * bound(reference)


def test_two_adds_are_one_add_of_the_sum(llm: LLM) -> None:
    reference = logprobs(llm, edit("v_plus_w", 1.5))
    together = logprobs(llm, edit("v", 1.5), edit("w", 1.5))
    assert np.abs(together - reference).max() <= bound(reference)
    np.testing.assert_array_equal(together, logprobs(llm, edit("w", 1.5), edit("v", 1.5)))
    assert np.abs(reference - logprobs(llm, edit("v", 1.5))).max() >= 100 * bound(reference)


def test_setting_twice_is_setting_once(llm: LLM) -> None:
    once = logprobs(llm, {"vector": "v", "op": "set", "target": 3.0})
    twice = logprobs(llm, *[{"vector": "v", "op": "set", "target": 3.0}] * 2)
    assert np.abs(twice - once).max() <= bound(once)
    assert np.abs(once - logprobs(llm)).max() >= 100 * bound(once)
