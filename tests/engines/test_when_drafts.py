"""Triggers under speculative decoding: windows follow the tokens that were accepted, never those that were drafted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.driving import edit, generate, sampled, steering, tokens
from helpers.engines import RUNNER
from helpers.oracle import Oracle
from helpers.traffic import Ask, Start, drafts_of

from steer_engine import LLM

NUM, LENGTH = (8, 12) if RUNNER == "v1" else (3, 6)
PROMPTS = [tokens(600 + number, 12 + number) for number in range(NUM)]
BASE = edit("r1", 2.5, scope="generation")


@pytest.fixture(scope="module")
def llm(start: Start, tiny_llama: str) -> LLM:
    """The model drafts for itself, unsteered: a steered request rejects many of its drafts."""
    return start(speculative_config={"model": tiny_llama, "num_speculative_tokens": 3}, max_num_seqs=16)


def test_windows_follow_accepted_tokens_only(tiny: LLM, llm: LLM, oracle: Oracle) -> None:
    """Each request has one trigger that is drafted and rejected, and one that is accepted."""
    plain = [sampled(output)[0] for output in generate(tiny, PROMPTS, [None] * NUM, max_tokens=LENGTH)]
    spec = steering(BASE)
    steered = [sampled(output)[0] for output in generate(tiny, PROMPTS, [spec] * NUM, max_tokens=LENGTH)]
    asks, opened = [], []
    for prompt, drafted, accepted in zip(PROMPTS, plain, steered, strict=True):
        # The first draft after the prompt continues it as the unsteered model would.
        rejected = [token for token in drafted if token not in accepted and token not in prompt]
        edits: list[dict[str, Any]] = [BASE]
        if rejected:
            edits.append(edit("r8", 2.0, scope={"after": rejected[0], "each": True}))
        if accepted[1] not in prompt:
            edits.append(edit("r9", 1.5, blocks=2, scope={"after": accepted[1], "tokens": 3}))
        asks.append(Ask(prompt, {"edits": edits}, LENGTH))
        opened.append(bool(rejected))
    assert sum(opened) >= NUM // 2, "the steered answers must reject drafts that hold a trigger"
    outputs, accepted_drafts = drafts_of(llm, asks)
    assert accepted_drafts > 0
    for ask, output in zip(asks, outputs, strict=True):
        ids, logprobs = sampled(output)
        whole = [*ask.prompt, *ids]
        rows = np.arange(len(ask.prompt) - 1, len(whole) - 1)
        expected = oracle.logprobs(whole, ask.spec, len(ask.prompt))[rows, ids]
        assert np.abs(np.subtract(logprobs, expected)).max() <= 1e-4, ask
