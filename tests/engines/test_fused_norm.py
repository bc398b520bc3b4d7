"""Edits inside the norm that follows a block: the same logprobs, by another path through the graph."""

from __future__ import annotations

import numpy as np
import pytest
from helpers.driving import edit, score, steering, tokens
from helpers.engines import RUNNER, TINY_BLOCKS, TINY_HIDDEN, random_vector
from helpers.fused import assert_fused_equals_unfused, engine


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
