"""Reading for clients: what may read, and the rows on their way into the answer.

`fetching` goes around `AsyncLLM.generate` (set by `shutdown`, which wraps it): when a reading request is finished, its
rows are fetched from the workers before its last output is handed on; when it is aborted, they are given up there. By
then the engine has been told of the abort, and hears of this after it. Known for vLLM 0.32, 0.33.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from steer_engine.api.captures import Captured, Captures
from steer_engine.capture import CAPTURE_KEY, PARAM, CaptureRequest
from steer_engine.errors import SteeringRequestError
from steer_engine.resolve import ResolvedCapture

CAPTURED = "_steer_engine_captured"
"""Attribute of a request object; keeps its `Captured` alive."""

ONE_PROMPT = "A request that reads has one prompt and one answer to it."

logger = logging.getLogger(__name__)

_forgetting: set[asyncio.Task[Any]] = set()
"""Kept: a task that nothing refers to may be collected."""


def admit(frontend: Any, serving: Any, request: Any, asked: ResolvedCapture, report: dict[str, Any]) -> CaptureRequest:
    """Let a request read: what goes into its extra arguments. Its report will get the rows.

    Raises:
        SteeringRequestError: its answer could not carry them.
    """
    _check_answer(serving, request)
    if frontend.captures is None:
        frontend.captures = Captures(
            max_bytes=frontend.limits.max_capture_bytes,
            max_at_once=frontend.limits.max_captures,
            hidden_size=frontend.model.hidden_size,
        )
    captured: Captured = frontend.captures.begin(asked, report)
    object.__setattr__(request, CAPTURED, captured)
    return captured.request


def check_delivered(request: Any) -> None:
    """Raise where an answer is made before its rows are there: no request that reads comes back without."""
    captured: Captured | None = getattr(request, CAPTURED, None)
    if captured is not None and not captured.delivered:
        raise RuntimeError("What the request asked to read is not there.")


def fetching(original: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    def generate(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        stream = original(self, *args, **kwargs)
        params = args[1] if len(args) > 1 else kwargs.get("sampling_params")
        asked = (getattr(params, "extra_args", None) or {}).get(CAPTURE_KEY)
        # Anything else under that key is refused where the request is compiled.
        return _fetching(self, asked, stream) if isinstance(asked, CaptureRequest) else stream

    return generate


async def _fetching(async_llm: Any, asked: CaptureRequest, stream: Any) -> AsyncGenerator[Any, None]:
    from vllm.exceptions import VLLMValidationError

    from steer_engine.vllm.engine_client import take

    captures = async_llm.input_processor.steering.captures
    captured = captures.find(asked.key)
    if captured is None or captured.begun:
        await stream.aclose()
        raise VLLMValidationError(ONE_PROMPT, parameter=PARAM)
    captured.begun = True
    async with captures.places:
        try:
            async with aclosing(stream):
                async for output in stream:
                    if output.finished and all(choice.finish_reason != "abort" for choice in output.outputs):
                        rows_LPD = await take(async_llm, asked.key)
                        await asyncio.to_thread(captured.deliver, rows_LPD, len(output.prompt_token_ids))
                    yield output
        finally:
            if not captured.delivered:
                await _forget(async_llm, asked.key)


async def _forget(async_llm: Any, key: str) -> None:
    """Also where the caller is cancelled once more while it waits."""
    from steer_engine.vllm.engine_client import take

    async def forget() -> None:
        try:
            await take(async_llm, key, wanted=False)
        except Exception as error:
            logger.debug("The engine was not told to give up what was read: %r", error)  # it has ended

    task = asyncio.ensure_future(forget())
    _forgetting.add(task)
    task.add_done_callback(_forgetting.discard)
    await asyncio.shield(task)


def _check_answer(serving: Any, request: Any) -> None:
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch

    if isinstance(serving, AnthropicServingMessages | OpenAIServingChatBatch):
        raise SteeringRequestError(
            "This endpoint's answer cannot carry what is read; chat completions, completions, responses and "
            "/inference/v1/generate can.",
            PARAM,
        )
    for field in ("stream", "background"):
        if getattr(request, field, False):
            raise SteeringRequestError(f"What is read is returned in a whole answer only; leave '{field}' out.", PARAM)
    params = getattr(request, "sampling_params", None)
    choices = [getattr(holder, field, None) or 1 for holder in (request, params) for field in ("n", "best_of")]
    prompt = getattr(request, "prompt", None)
    several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    if several or any(number > 1 for number in choices):
        raise SteeringRequestError(ONE_PROMPT, PARAM)
