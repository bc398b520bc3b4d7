"""Wraps `OpenAIServingChat.chat_completion_{full,stream}_generator` and `OpenAIServingChatBatch`'s full generator.

Why: the answer of a steered request says what was applied. Known for vLLM 0.32; in 0.33 the stream's text goes through
`chat_completion_stream_generator_raw`, below the one wrapped here.
"""

from __future__ import annotations

from typing import Any

from steer_engine.runtime.vllm.patching import wrap
from steer_engine.serving.streaming import with_report
from steer_engine.serving.vllm import symbols
from steer_engine.serving.vllm.asked_model import tell_asked_model
from steer_engine.serving.vllm.check_model import report_of


def hook() -> None:
    wrap(symbols.CHAT_FULL, _full)
    wrap(symbols.CHAT_STREAM, _stream)
    wrap(symbols.CHAT_BATCH_FULL, _full)


def _full(original: Any) -> Any:
    async def full_generator(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

        response = await tell_asked_model(original, request, (self, request, *args), kwargs)
        report = report_of(request)
        if report is not None and isinstance(response, ChatCompletionResponse):
            response.steering = report
        return response

    return full_generator


def _stream(original: Any) -> Any:
    def stream_generator(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        stream = tell_asked_model(original, request, (self, request, *args), kwargs)
        report = report_of(request)
        return stream if report is None else with_report(stream, report)

    return stream_generator
