"""Only null and false mean no steering, on every way into an engine; other falsy values are errors."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from vllm.exceptions import VLLMValidationError
from vllm.sampling_params import SamplingParams

from steer_engine.api.frontend import Frontend
from steer_engine.errors import SteeringRequestError
from steer_engine.model_shape import ModelShape
from steer_engine.settings import ALL_OPS, SteeringConfig
from steer_engine.vllm import check_model, engine_core, intake

SHAPE = ModelShape(hidden_size=4, num_blocks=2, armed_blocks=(0, 1), ops=ALL_OPS, rows=4, dtype="float32")
ABSENT = [None, False, "null", "false", " false\n"]
FALSY = [0, 0.0, -0.0, "", [], {}, "0", "[]", "{}"]


def request(value: Any) -> Any:
    params = SamplingParams(extra_args={"steering": value})
    return SimpleNamespace(sampling_params=params, prompt_token_ids=[1, 2], prompt_embeds=None, request_id="a")


@pytest.mark.parametrize("armed", [True, False])
def test_a_value_that_python_takes_for_false_is_refused(armed: bool) -> None:
    frontend = Frontend(SteeringConfig(), SHAPE) if armed else Frontend(None, None)
    for value in FALSY:
        with pytest.raises(SteeringRequestError):
            intake._resolved(frontend, request(value).sampling_params)
        with pytest.raises(VLLMValidationError):
            intake._compile(frontend, request(value), 512, resumable=False)
        with pytest.raises(SteeringRequestError, match="uncompiled"):
            engine_core._check_steering(SimpleNamespace(), request(value))
    for value in ABSENT:
        assert intake._resolved(frontend, request(value).sampling_params) is None
        assert intake._compile(frontend, request(value), 512, resumable=False) == {}
        engine_core._check_steering(SimpleNamespace(), request(value))


@pytest.mark.parametrize("value", [0, 0.0, -0.0, "", [], {}])
def test_a_request_s_field_that_python_takes_for_false_specifies_steering(value: Any) -> None:
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest

    parsed = CompletionRequest.model_validate({"model": "m", "prompt": "x", "steering": value})
    requested = check_model.requested_steering(parsed)
    with pytest.raises(SteeringRequestError):
        Frontend(SteeringConfig(), SHAPE).resolve(requested)


@pytest.mark.parametrize(
    "fields",
    [
        {"metadata": {"steering": {"edits": []}}},
        {"chat_template_kwargs": {"steering": {"edits": []}}},
        {"kv_transfer_params": {"steering": {"edits": []}}},
        {"options": {"steering": {"edits": []}}},
        {"extra_body": '{"steering": {"edits": []}}'},
        {"Steering": {"edits": []}},
    ],
)
def test_a_parsed_request_without_a_middleware_is_searched(fields: dict[str, Any]) -> None:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest

    messages = [{"role": "user", "content": "hi"}]
    parsed = ChatCompletionRequest.model_validate({"model": "m", "messages": messages, **fields})
    with pytest.raises(SteeringRequestError):
        check_model.requested_steering(parsed)
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"steering": {}}}}}]
    plain = ChatCompletionRequest.model_validate({"model": "m", "messages": messages, "tools": tools})
    assert check_model.requested_steering(plain) is None
