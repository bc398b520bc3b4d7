"""Edits inside the norm that follows a block, compared with edits before it, for engines on any device."""

from __future__ import annotations

from typing import Any

import numpy as np

from helpers.driving import edit, score, steering, tokens
from helpers.engines import SETTINGS, kept, random_vector
from steer_engine import LLM
from steer_engine.settings import SteeringConfig

MIXED = [
    None,
    steering(edit("r0", 1.5)),
    steering(edit("r1", 1.0), edit("r2", op="ablate", blocks=[0, 2]), preserve_norm=True),
]


def engine(path: str, vectors: dict[str, Any], *, fuse: bool, eager: bool = True) -> LLM:
    config = SteeringConfig(fuse_norm=fuse)
    settings = {**SETTINGS, "dtype": "float32", "enforce_eager": eager}
    llm: LLM = kept(LLM(path, vectors=vectors, steering=config, **settings))
    return llm


def calls(llm: LLM) -> int:
    count: int = llm.steering_status()["workers"][0]["fused_calls"]
    return count


def assert_fused_equals_unfused(
    path: str, num_blocks: int, hidden_size: int, length: int, norm: float, effect: float, *, eager: bool = True
) -> None:
    """Logprobs of prompts of `length` tokens. effect: nats by which steering moves one at least.

    eager: every step calls the launcher. Otherwise graphs replay it, and only the compiled step has called it.
    """
    vectors = {
        f"r{seed}": random_vector(seed, num_blocks=num_blocks, hidden_size=hidden_size, norm=norm) for seed in range(3)
    }
    unfused, fused = (engine(path, vectors, fuse=fuse, eager=eager) for fuse in (False, True))
    # The path is proved by what ran: every block found its norm, and every step launched it.
    assert fused.steering_status()["workers"][0]["fused_blocks"] == list(range(num_blocks))
    assert unfused.steering_status()["workers"][0]["fused_blocks"] == []
    prompts = [tokens(400 + i, length) for i in range(len(MIXED))]
    before = calls(fused)
    ours = score(fused, prompts, MIXED)
    if eager:
        assert calls(fused) - before >= num_blocks
        assert (calls(fused) - before) % num_blocks == 0
    assert calls(fused) >= num_blocks
    theirs = score(unfused, prompts, MIXED)
    assert calls(unfused) == 0
    plain = score(unfused, prompts, [None] * len(MIXED))
    for number, (one, other, without) in enumerate(zip(ours, theirs, plain, strict=True)):
        # A rounding of the stream per block, each carried to the logits.
        bound = 32 * num_blocks * np.finfo(np.float32).eps * float(np.abs(other).max())
        assert np.abs(one - other).max() <= bound
        if MIXED[number] is not None:
            assert np.abs(other - without).max() >= max(100 * bound, effect)
