"""Wrappers that let an answer say what was applied, and name the model as it was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steer_engine.api.streaming import with_report
from steer_engine.vllm import symbols
from steer_engine.vllm.check_model import report_of, tell_asked_model
from steer_engine.vllm.patching import wrap


def whole(answer_class: Callable[[], Any]) -> Callable[[Any], Any]:
    """For a method that makes a whole answer of `(self, request, ...)`; an error that it returns says nothing.

    answer_class: gives the class of its answers, once vLLM is imported.
    """

    def wrapper(original: Any) -> Any:
        async def full_generator(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
            response = await tell_asked_model(original, request, (self, request, *args), kwargs)
            report = report_of(request)
            if report is not None and isinstance(response, answer_class()):
                response.steering = report
            return response

        return full_generator

    return wrapper


def stream(original: Any) -> Any:
    """For a method that makes a stream of `(self, request, ...)`: its final chunks say it."""

    def stream_generator(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        chunks = tell_asked_model(original, request, (self, request, *args), kwargs)
        report = report_of(request)
        return chunks if report is None else with_report(chunks, report)

    return stream_generator


def hook_chat() -> None:
    wrap(symbols.CHAT_FULL, whole(_answer))
    wrap(symbols.CHAT_STREAM, stream)
    wrap(symbols.CHAT_BATCH_FULL, whole(_answer))


def _answer() -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

    return ChatCompletionResponse


def hook_completion() -> None:
    wrap(symbols.COMPLETION_FULL, _full)
    wrap(symbols.COMPLETION_STREAM, stream)


def _full(original: Any) -> Any:
    def to_response(self: Any, final_res_batch: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        response = tell_asked_model(original, request, (self, final_res_batch, request, *args), kwargs)
        if (report := report_of(request)) is not None:
            response.steering = report
        return response

    return to_response


def hook_responses() -> None:
    wrap(symbols.RESPONSE_FROM_REQUEST, _from_request)


def _from_request(original: Any) -> Any:
    def from_request(cls: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        response = tell_asked_model(original, request, (cls, request, *args), kwargs)
        if (report := report_of(request)) is not None:
            response.steering = report
        return response

    return from_request


def hook() -> None:
    hook_chat()
    hook_completion()
    hook_responses()
