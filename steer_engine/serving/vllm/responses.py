"""Wraps `ResponsesResponse.from_request`, which makes every state of a responses answer. Known for vLLM 0.32, 0.33.

Why: the answer of a steered request says what was applied; in a stream, from `response.created` to
`response.completed`, and when it is fetched again later.
"""

from __future__ import annotations

from typing import Any

from steer_engine.runtime.vllm.patching import wrap
from steer_engine.serving.vllm import symbols
from steer_engine.serving.vllm.asked_model import tell_asked_model
from steer_engine.serving.vllm.check_model import report_of


def hook() -> None:
    wrap(symbols.RESPONSE_FROM_REQUEST, _from_request)


def _from_request(original: Any) -> Any:
    def from_request(cls: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        response = tell_asked_model(original, request, (cls, request, *args), kwargs)
        if (report := report_of(request)) is not None:
            response.steering = report
        return response

    return from_request
