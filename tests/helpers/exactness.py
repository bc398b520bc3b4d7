"""Specs of every kind for the tiny model, and comparisons of an engine's answers with the oracle, on any device."""

from __future__ import annotations

from typing import Any

import numpy as np

from helpers.driving import distribution, edit, generate, prompt_logprobs, sampled, tokens
from helpers.engines import TINY_VOCAB
from helpers.oracle import Oracle
from steer_engine import LLM

OPERATIONS = {
    "add": [edit("r0", -0.7)],
    "two adds": [edit("r0", 0.7), edit("r1", -1.2)],
    "adds of different blocks": [edit("r0", 0.7, blocks="0-1"), edit("r1", -1.2, blocks=[1, 2])],
    "add_relative": [edit("r2", 0.4, op="add_relative")],
    "ablate": [edit("r3", op="ablate"), edit("r0", 1.0, op="ablate", blocks=1)],
    "half ablate": [edit("r3", 0.5, op="ablate"), edit("r4", 2.0, op="ablate")],
    "clamp": [{"vector": "r4", "op": "clamp", "lo": 0.5, "hi": 1.5}],
    "clamp below": [{"vector": "r4", "op": "clamp", "hi": -0.5}],
    "set": [{"vector": "r5", "op": "set", "target": 2.0}],
    "mixed order": [edit("r0", 1.0), edit("r3", 1.0, op="ablate"), edit("r1", 0.8), edit("r6", 0.2, op="add_relative")],
    "gate": [edit("r0", 1.5, gate={"vector": "r7", "min_cos": 0.0})],
    "feature set": [{"vector": "relu", "op": "feature", "feature": 3, "target": 3.0}],
    "features scaled": [{"vector": "jump", "op": "feature", "feature": [40, 3], "scale": -3.0}],
    "features set": [{"vector": "jump", "op": "feature", "feature": [40, 3], "target": 2.0}],
    "feature added": [{"vector": "relu", "op": "feature", "feature": [3], "add": -2.0, "scope": {"start": 5}}],
    "low_rank": [{"vector": "reft", "op": "low_rank"}],
    "rotate": [{"vector": "r1", "op": "rotate", "toward": "r2", "degrees": 70}],
    "rotate to": [{"vector": "r1", "op": "rotate", "toward": "r2", "to_degrees": -120, "blocks": [0, 2]}],
    "gates on dot products": [
        edit("r0", 1.5, gate={"vector": "r7", "min_dot": 0.02}),
        edit("r1", 1.5, blocks=1, gate={"vector": "relu", "feature": 3, "min_dot": 0.12}),
    ],
    "rows among others": [
        edit("r0", 1.0, blocks=1),
        {"vector": "reft", "op": "low_rank", "blocks": 1, "scale": 0.7, "gate": {"vector": "r7", "min_dot": 0.0}},
    ],
    "gate above": [edit("r0", 1.5, gate={"vector": "r7", "max_cos": 0.05}), edit("r1", 0.5)],
}

AT_SITES = {
    "attention": [edit("r0", 1.5, site="attn", blocks=1)],
    "mlp": [edit("r0", 1.5, site="mlp", blocks=1)],
    "all sites of a block": [
        edit(f"r{i}", 1.0, site=site, blocks=0) for i, site in enumerate(("mlp", "block", "attn"))
    ],
    "operations": [
        edit("r3", op="ablate", site="attn"),
        {"vector": "r5", "op": "set", "target": 1.0, "site": "mlp", "blocks": [0, 2]},
        edit("r2", 0.4, op="add_relative", site="mlp"),
        {"vector": "reft", "op": "low_rank", "site": "attn", "blocks": 1},
        edit("r1", 0.5),
    ],
    "gate": [edit("r0", 1.5, site="mlp", gate={"vector": "r7", "min_cos": 0.0})],
    "scope": [
        edit("r0", 2.0, site="attn", scope={"start": 3, "end": 17}),
        edit("r1", 1.0, site="mlp", scope={"start": -5}),
    ],
}

PROMPT = tokens(0, 40)
# Rounding grows with the work done after an edit; plain vLLM differs from Hugging Face by this much without steering,
# which each test measures anew. An edited stream is of another size, so its rounding is too: hence the factor.
ROUNDING_FACTOR = 8.0
FLOOR = 2e-6


def teacher_forced(oracle: Oracle, ids: list[int], spec: Any, prompt_len: int | None = None) -> np.ndarray:
    """float64 [T - 1]: logprob of each token but the first."""
    logprobs_TV = oracle.logprobs(ids, spec, prompt_len)
    return np.array([logprobs_TV[t, token] for t, token in enumerate(ids[1:])])


def assert_same(llm: LLM, oracle: Oracle, spec: dict[str, Any], *, most: float = 5e-5) -> None:
    """All prompt logprobs and the whole first distribution agree with the oracle, and steering moved them.

    most: by how much plain vLLM may differ from Hugging Face, in nats.
    """
    outputs = generate(llm, [PROMPT, PROMPT], [None, spec], prompt_logprobs=0, max_tokens=1, logprobs=TINY_VOCAB)
    plain, steered = ([*prompt_logprobs(out), *distribution(out, TINY_VOCAB)] for out in outputs)
    expected_plain, expected = (
        [*teacher_forced(oracle, PROMPT, s), *oracle.logprobs(PROMPT, s)[-1]] for s in (None, spec)
    )
    rounding = max(float(np.abs(np.subtract(plain, expected_plain)).max()), FLOOR)
    assert rounding < most, "plain vLLM itself differs from Hugging Face"
    error = float(np.abs(np.subtract(steered, expected)).max())
    assert np.isfinite(error)
    assert error <= ROUNDING_FACTOR * rounding
    effect = float(np.abs(np.subtract(steered, plain)).max())
    assert effect >= 100 * ROUNDING_FACTOR * rounding, "steering had no effect to speak of"


MARKED = [*tokens(40, 12), 77, 78, *tokens(41, 6), 90, *tokens(42, 3), 77, 78, *tokens(43, 9)]
"""A prompt in which the windows of `WINDOWS` open and close."""
SAMPLED = 16
BOUND = 5e-5
"""Nats, float32."""


def forced(oracle: Oracle, prompt: list[int], answer: list[int], spec: Any) -> np.ndarray:
    """float64 [T]: the logprobs of the answer's tokens."""
    logprobs_TV = oracle.logprobs([*prompt, *answer], spec, len(prompt))
    return np.array([logprobs_TV[len(prompt) - 1 + t, token] for t, token in enumerate(answer)])


def assert_exact(
    llm: LLM, oracle: Oracle, spec: dict[str, Any], *, prompt: list[int] = MARKED, bound: float = BOUND, **fields: Any
) -> Any:
    """The answer is the oracle's; returns vLLM's output and how far each token's logprob was moved."""
    output = generate(llm, [prompt], [spec], max_tokens=SAMPLED, **fields)[0]
    ids, logprobs = sampled(output)
    expected_T = forced(oracle, prompt, ids, spec)
    assert np.abs(np.subtract(logprobs, expected_T)).max() <= bound
    return output, np.abs(expected_T - forced(oracle, prompt, ids, None))


WINDOWS = {
    "last prompt token": "last_prompt_token",
    "first tokens of the answer": {"from": "generation", "start": 0, "end": 4},
    "later tokens of the answer": {"from": "generation", "start": 5},
    "after": {"after": 90},
    "after a sequence": {"after": [77, 78]},
    "after each": {"after": [77, 78], "each": True, "tokens": 3},
    "between": {"after": [77, 78], "until": 90},
    "until": {"until": 90},
    "except": {"except": {"after": [77, 78], "until": 90, "each": True}},
    "of the answer": {"after": 90, "from": "generation", "start": 2},
    "in a span": {"after": 77, "start": 10, "end": -4},
    "tokens": {"after": 77, "tokens": 5},
}

SCHEDULES = [{"kind": "linear", "over": 8, "to": 0.0}, {"kind": "exponential", "over": 6, "to": 0.1}]

PLACES = ["last_prompt_token", "mean_prompt", "max_prompt"]
