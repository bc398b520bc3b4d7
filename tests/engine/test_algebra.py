"""Invariant 4: specs that mean the same give the same."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import random_vector
from driving import edit, score, steering, tokens

from steer_engine import LLM

PROMPT = tokens(1, 24)


@pytest.fixture(scope="module", autouse=True)
def related_vectors(tiny: LLM) -> None:
    """v, 20*v, -v, w and v + w under names of their own."""
    v, w = random_vector(100), random_vector(101)
    for name, vector in {"v": v, "v20": v * 20.0, "minus_v": -v, "w": w, "v_plus_w": v + w}.items():
        tiny.vectors.add(name, vector)


def logprobs(llm: LLM, *edits: dict[str, object]) -> np.ndarray:
    llm.llm_engine.reset_prefix_cache()
    return score(llm, [PROMPT], [steering(*edits) if edits else None])[0]


def bound(reference: np.ndarray) -> float:
    """A few float32 roundings of the edited stream, carried through three blocks."""
    return 64 * float(np.finfo(np.float32).eps) * float(np.abs(reference).max())


def test_nothing_is_nothing(tiny: LLM) -> None:
    plain = logprobs(tiny)
    np.testing.assert_array_equal(logprobs(tiny, edit("v", 0.0)), plain)
    np.testing.assert_array_equal(logprobs(tiny, edit("v", 1.3), edit("v", -1.3)), plain)
    np.testing.assert_array_equal(logprobs(tiny, edit("v", 1.3, scope={"start": 5, "end": 5})), plain)
    cancelled = logprobs(tiny, edit("v", 1.3), edit("minus_v", 1.3))
    assert np.abs(cancelled - plain).max() <= bound(plain)
    assert np.abs(logprobs(tiny, edit("v", 1.3)) - plain).max() >= 100 * bound(plain)


def test_scale_and_vector_are_one_product(tiny: LLM) -> None:
    reference = logprobs(tiny, edit("v", 20.0))
    assert np.abs(logprobs(tiny, edit("v20", 1.0)) - reference).max() <= bound(reference)
    assert np.abs(logprobs(tiny, edit("minus_v", -20.0)) - reference).max() <= bound(reference)
    np.testing.assert_array_equal(logprobs(tiny, edit("v", 12.0), edit("v", 8.0)), reference)
    assert np.abs(reference - logprobs(tiny)).max() >= 100 * bound(reference)


def test_two_adds_are_one_add_of_the_sum(tiny: LLM) -> None:
    reference = logprobs(tiny, edit("v_plus_w", 1.5))
    together = logprobs(tiny, edit("v", 1.5), edit("w", 1.5))
    assert np.abs(together - reference).max() <= bound(reference)
    np.testing.assert_array_equal(together, logprobs(tiny, edit("w", 1.5), edit("v", 1.5)))
    assert np.abs(reference - logprobs(tiny, edit("v", 1.5))).max() >= 100 * bound(reference)


def test_setting_twice_is_setting_once(tiny: LLM) -> None:
    once = logprobs(tiny, {"vector": "v", "op": "set", "target": 3.0})
    twice = logprobs(tiny, *[{"vector": "v", "op": "set", "target": 3.0}] * 2)
    assert np.abs(twice - once).max() <= bound(once)
    assert np.abs(once - logprobs(tiny)).max() >= 100 * bound(once)
