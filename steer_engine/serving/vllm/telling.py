"""Wrappers that let an answer say what was applied, and name the model as it was asked for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steer_engine.serving.streaming import with_report
from steer_engine.serving.vllm.asked_model import tell_asked_model
from steer_engine.serving.vllm.check_model import report_of


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
