"""A real chat model that was told to use tags: steered only inside its reasoning, only after it, or outside it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.driving import edit, generate, sampled, steering
from helpers.engines import random_vector
from helpers.oracle import Oracle
from helpers.oracle_when import covered

from steer_engine import LLM

CHAT = [
    {"role": "system", "content": "First think between <think> and </think>, then answer."},
    {"role": "user", "content": "Is ice cold?"},
    {"role": "assistant", "content": "\n<think>\nIce is frozen water.\n</think>\nYes."},
    {"role": "user", "content": "Can fish fly?"},
    {"role": "assistant", "content": "\n<think>\nFish live in the sea.\n</think>\nNo."},
    {"role": "user", "content": "Is fire hot?"},
]
OPEN, CLOSE = "\n<think>\n", "\n</think>\n"
WINDOW = {"after": OPEN, "until": CLOSE, "each": True}
SCOPES: dict[str, Any] = {
    "inside": WINDOW | {"from": "generation"},
    "after": {"after": CLOSE, "until": OPEN, "each": True, "from": "generation"},
    "outside": {"except": WINDOW, "from": "generation"},
}

BOUND = 2e-4
"""Of a logprob in float32 against another implementation of the same model, 30 blocks deep."""


def with_ids(scope: dict[str, Any], ids: dict[str, list[int]]) -> dict[str, Any]:
    """The scope with token ids for texts, as the oracle takes it."""
    found = {key: ids.get(value, value) if isinstance(value, str) else value for key, value in scope.items()}
    return found | ({"except": with_ids(scope["except"], ids)} if "except" in scope else {})


@pytest.fixture(scope="module")
def oracle(smollm2: str) -> Oracle:
    return Oracle(smollm2, {"r0": random_vector(0, num_blocks=30, hidden_size=576, norm=4.0)})


@pytest.mark.parametrize("name", SCOPES)
def test_a_model_that_was_told_to_think_between_tags(real: LLM, oracle: Oracle, name: str) -> None:
    tokenizer: Any = real.get_tokenizer()
    text = tokenizer.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    prompt: list[int] = tokenizer.encode(text, add_special_tokens=False)
    ids = {tag: list(tokenizer.encode(tag, add_special_tokens=False)) for tag in (OPEN, CLOSE)}
    strength = edit("r0", 2.0, blocks="12-16", scope=SCOPES[name])

    (output,) = generate(real, [prompt], [steering(strength)], max_tokens=20, ignore_eos=False)
    tokens, logprobs = sampled(output)
    answer = tokenizer.decode(tokens)
    assert OPEN in answer, answer
    assert CLOSE in answer, answer

    spec = steering(strength | {"scope": with_ids(SCOPES[name], ids)})
    steered_T = at(oracle, prompt, tokens, spec)
    assert np.abs(np.subtract(logprobs, steered_T)).max() <= BOUND

    # It covers some of the tokens that chose the answer, not all; before the first of them, nothing moves.
    inside_T = covered(spec["edits"][0]["scope"], [*prompt, *tokens[:-1]], len(prompt))[0].numpy()[len(prompt) - 1 :]
    assert 0 < inside_T.sum() < len(tokens)
    assert output.steering["edits"][0]["applied_tokens"] == inside_T.sum()
    moved_T = np.abs(steered_T - at(oracle, prompt, tokens, None))
    first = int(inside_T.argmax())
    assert not moved_T[:first].any()
    assert moved_T[inside_T].max() >= 1e-2


def at(oracle: Oracle, prompt: list[int], answer: list[int], spec: Any) -> np.ndarray:
    """float64 [T]: the logprobs of the answer's tokens."""
    logprobs_TV = oracle.logprobs([*prompt, *answer], spec, len(prompt))
    return np.array([logprobs_TV[len(prompt) - 1 + t, token] for t, token in enumerate(answer)])
