"""Wraps `OpenAIServingCompletion.request_output_to_completion_response` and `completion_stream_generator`.

Why: the answer of a steered request says what was applied. Known for vLLM 0.32, 0.33.
"""

from __future__ import annotations

from typing import Any

from steer_engine.runtime.vllm.patching import wrap
from steer_engine.serving.vllm import symbols, telling
from steer_engine.serving.vllm.asked_model import tell_asked_model
from steer_engine.serving.vllm.check_model import report_of


def hook() -> None:
    wrap(symbols.COMPLETION_FULL, _full)
    wrap(symbols.COMPLETION_STREAM, telling.stream)


def _full(original: Any) -> Any:
    def to_response(self: Any, final_res_batch: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        response = tell_asked_model(original, request, (self, final_res_batch, request, *args), kwargs)
        if (report := report_of(request)) is not None:
            response.steering = report
        return response

    return to_response
