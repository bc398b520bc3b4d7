"""Edits inside the norm that follows a block: the same logprobs, by another path through the graph."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.driving import edit, score, steering, tokens
from helpers.engines import RUNNER, SETTINGS, TINY_BLOCKS, TINY_HIDDEN, kept, random_vector

from steer_engine import LLM
from steer_engine.settings import SteeringConfig

MIXED = [
    None,
    steering(edit("r0", 1.5)),
    steering(edit("r1", 1.0), edit("r2", op="ablate", blocks=[0, 2]), preserve_norm=True),
]


def engine(path: str, vectors: dict[str, Any], *, fuse: bool) -> LLM:
    config = SteeringConfig(fuse_norm=fuse)
    return kept(LLM(path, vectors=vectors, steering=config, enforce_eager=True, dtype="float32", **SETTINGS))


def calls(llm: LLM) -> int:
    count: int = llm.steering_status()["workers"][0]["fused_calls"]
    return count


def assert_fused_equals_unfused(
    path: str, num_blocks: int, hidden_size: int, length: int, norm: float, effect: float
) -> None:
    vectors = {
        f"r{seed}": random_vector(seed, num_blocks=num_blocks, hidden_size=hidden_size, norm=norm) for seed in range(3)
    }
    unfused, fused = (engine(path, vectors, fuse=fuse) for fuse in (False, True))
    # The path is proved by what ran: every block found its norm, and every step launched it.
    assert fused.steering_status()["workers"][0]["fused_blocks"] == list(range(num_blocks))
    assert unfused.steering_status()["workers"][0]["fused_blocks"] == []
    prompts = [tokens(400 + i, length) for i in range(len(MIXED))]
    before = calls(fused)
    ours = score(fused, prompts, MIXED)
    assert calls(fused) - before >= num_blocks
    assert (calls(fused) - before) % num_blocks == 0
    theirs = score(unfused, prompts, MIXED)
    assert calls(unfused) == 0
    plain = score(unfused, prompts, [None] * len(MIXED))
    for number, (one, other, without) in enumerate(zip(ours, theirs, plain, strict=True)):
        # A rounding of the stream per block, each carried to the logits.
        bound = 32 * num_blocks * np.finfo(np.float32).eps * float(np.abs(other).max())
        assert np.abs(one - other).max() <= bound
        if MIXED[number] is not None:
            assert np.abs(other - without).max() >= max(100 * bound, effect)


@pytest.mark.v2_only
def test_tiny_model(tiny_llama: str) -> None:
    assert_fused_equals_unfused(tiny_llama, TINY_BLOCKS, TINY_HIDDEN, length=12, norm=1.0, effect=0.05)


@pytest.mark.v2_only
@pytest.mark.slow
def test_real_model(smollm2: str) -> None:
    assert_fused_equals_unfused(smollm2, 30, 576, length=6, norm=4.0, effect=0.05)


@pytest.mark.v1_only
def test_without_triton_nothing_is_fused(tiny_llama: str) -> None:
    """Where fusing is requested but not possible, it is left out with a line in the log, and steering works."""
    assert RUNNER == "v1"
    llm = engine(tiny_llama, {"r0": random_vector(0)}, fuse=True)
    assert llm.steering_status()["workers"][0]["fused_blocks"] == []
    plain, steered = score(llm, [tokens(9, 20)] * 2, [None, steering(edit("r0", 2.0))])
    assert np.abs(plain - steered).max() > 0.05
