"""An offline engine resolves the steering of a request exactly once. Its engine core and worker run in this process,
so a second call anywhere would be counted."""

from __future__ import annotations

import base64
from typing import Any

import pytest
from helpers.counting import counted_resolving
from helpers.driving import edit, generate, params, sampled, steering, tokens
from helpers.engines import random_vector

from steer_engine import LLM
from steer_engine.vectors.safetensors_format import to_bytes

PROMPT = tokens(77, 12)
NAMED = steering(edit("r3", 2.0))


def inline(seed: int) -> dict[str, Any]:
    return {"data": base64.b64encode(to_bytes(random_vector(seed))).decode()}


@pytest.mark.parametrize("repeat", ["first", "again"])
@pytest.mark.parametrize("kind", ["named", "inline"])
def test_a_generated_request_is_resolved_once(tiny: LLM, kind: str, repeat: str) -> None:
    spec = NAMED if kind == "named" else {"edits": [{"vector": inline(3), "scale": 2.0}]}
    with counted_resolving() as calls:
        steered = generate(tiny, [PROMPT], [spec], max_tokens=1)[0]
    assert len(calls) == 1
    plain = generate(tiny, [PROMPT], [None], max_tokens=1)[0]
    assert sampled(steered) != sampled(plain)


def test_a_list_of_prompts_resolves_each_of_its_parameters_once(tiny: LLM) -> None:
    inputs: Any = [{"prompt_token_ids": PROMPT[:length]} for length in (5, 6, 7)]
    with counted_resolving() as calls:
        tiny.generate(inputs, params(NAMED, max_tokens=1), use_tqdm=False)
    assert len(calls) == 1
    with counted_resolving() as calls:
        tiny.generate(inputs, [params(NAMED, max_tokens=1) for _ in inputs], use_tqdm=False)
    assert len(calls) == 3


def test_several_samples_are_one_request(tiny: LLM) -> None:
    with counted_resolving() as calls:
        (output,) = generate(tiny, [PROMPT], [NAMED], n=3, temperature=1.0, max_tokens=2)
    assert len(output.outputs) == 3
    assert len(calls) == 1


def test_a_capture_resolves_its_steering_once_for_all_prompts(tiny: LLM) -> None:
    with counted_resolving() as calls:
        tiny.capture([PROMPT, PROMPT[:5]], steering=NAMED)
    assert len(calls) == 1
    with counted_resolving() as calls:
        tiny.capture([PROMPT])
    assert calls == []


def test_each_scored_prompt_is_resolved_once(tiny: LLM) -> None:
    with counted_resolving() as calls:
        tiny.score([PROMPT] * 3, steering=[None, NAMED, NAMED], baselines=[0, 0, 0], answers=[[1], [1], [1]])
    assert len(calls) == 2


def test_unsteered_requests_resolve_nothing(tiny: LLM) -> None:
    with counted_resolving() as calls:
        generate(tiny, [PROMPT] * 2, [None] * 2, max_tokens=1)
    assert calls == []
