"""Invariant 2: how the other requests of a batch are steered does not matter."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.driving import FEW, edit, generate, sampled, score, steering, tokens
from helpers.engines import RUNNER

from steer_engine import LLM

NUM = 32 if RUNNER == "v1" else 8
PROMPTS = [tokens(seed, 12 + seed % 9) for seed in range(NUM)]


def half_steered(offset: int) -> list[dict[str, Any] | None]:
    """Every second request steered, each by another vector."""
    return [steering(edit(f"r{(seed + offset) % 32}", 1.5)) if seed % 2 else None for seed in range(NUM)]


@pytest.fixture(params=["tiny", pytest.param("real", marks=pytest.mark.v1_only)])
def llm(request: pytest.FixtureRequest) -> LLM:
    engine: LLM = request.getfixturevalue(request.param)
    engine.llm_engine.reset_prefix_cache()
    return engine


def test_mixed_batch_against_alone(llm: LLM) -> None:
    """Teacher-forced logprobs in a mixed batch differ from alone no more than plain vLLM's own do."""
    specs = half_steered(0)
    plain_batch = score(llm, PROMPTS, [None] * NUM)
    batch = score(llm, PROMPTS, specs)
    chosen = range(0, NUM, 1 if RUNNER == "v1" else 3)
    plain_alone = {i: score(llm, [PROMPTS[i]], [None])[0] for i in chosen}
    alone = {i: score(llm, [PROMPTS[i]], [specs[i]])[0] for i in chosen}
    own = max(float(np.abs(plain_batch[i] - plain_alone[i]).max()) for i in chosen)
    ours = max(float(np.abs(batch[i] - alone[i]).max()) for i in chosen)
    floor = 32 * np.finfo(np.float32).eps * max(float(np.abs(batch[i]).max()) for i in chosen)
    assert ours <= 2 * max(own, floor)
    effects = [float(np.abs(batch[i] - plain_batch[i]).max()) for i in range(NUM)]
    assert min(effect for i, effect in enumerate(effects) if i % 2) >= 100 * 2 * max(own, floor)
    assert max(effect for i, effect in enumerate(effects) if not i % 2) == 0.0


def test_swapped_neighbours_change_nothing(llm: LLM) -> None:
    """Bit for bit: the unsteered half does not see how the other half is steered, in prompts and answers."""
    first = generate(llm, PROMPTS, half_steered(0), max_tokens=FEW)
    llm.llm_engine.reset_prefix_cache()
    second = generate(llm, PROMPTS, half_steered(5), max_tokens=FEW)
    for i, (one, other) in enumerate(zip(first, second, strict=True)):
        if i % 2:
            assert sampled(one) != sampled(other), f"request {i} was not steered differently"
        else:
            assert sampled(one) == sampled(other), f"request {i} saw its neighbours"


def test_a_steered_request_does_not_see_its_neighbours(llm: LLM) -> None:
    specs = half_steered(0)
    others = [spec if i % 4 == 1 else None for i, spec in enumerate(specs)]
    first = generate(llm, PROMPTS, specs, max_tokens=FEW)
    llm.llm_engine.reset_prefix_cache()
    second = generate(llm, PROMPTS, others, max_tokens=FEW)
    changed = 0
    for i in range(NUM):
        if i % 4 == 3:
            changed += sampled(first[i]) != sampled(second[i])
        else:
            assert sampled(first[i]) == sampled(second[i])
    assert changed == len(range(3, NUM, 4))
