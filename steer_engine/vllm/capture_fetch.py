"""Captured rows on their way from the workers into an answer.

`fetching` goes around `AsyncLLM.generate` (`shutdown` wraps it). When a capturing request finishes, its rows are
fetched from the workers before its last output is passed on. When it is aborted, the rows are dropped there; by
then the engine knows of the abort. Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import asyncio
import base64
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

import numpy as np
from safetensors.numpy import save
from vllm.sampling_params import RequestOutputKind

from steer_engine.api.answers import RequestNote, current_note
from steer_engine.capture import PARAM, CaptureRequest
from steer_engine.errors import SteeringRequestError
from steer_engine.site import Site
from steer_engine.vllm import engine_client
from steer_engine.vllm.intake import checked_steering, frontend_of

FORMAT = "steer-engine/capture/1"

ONE_PROMPT = "A request with a capture has one prompt and one answer."

logger = logging.getLogger(__name__)

_dropping: set[asyncio.Task[None]] = set()
"""Kept: a task without a reference may be collected."""


def check_endpoint(serving: Any, request: Any) -> None:
    """Raise SteeringRequestError where an answer cannot carry captured rows."""
    from vllm.entrypoints.anthropic.serving import AnthropicServingMessages
    from vllm.entrypoints.openai.chat_completion.batch_serving import OpenAIServingChatBatch

    if isinstance(serving, AnthropicServingMessages | OpenAIServingChatBatch):
        raise SteeringRequestError(
            "This endpoint's answer cannot carry captured rows; chat completions, completions, responses and "
            "/inference/v1/generate can.",
            PARAM,
        )
    for field in ("stream", "background"):
        if getattr(request, field, False):
            raise SteeringRequestError(
                f"Captured rows are returned in a whole answer only; leave '{field}' out.", PARAM
            )
    params = getattr(request, "sampling_params", None)
    choices = [getattr(holder, field, None) or 1 for holder in (request, params) for field in ("n", "best_of")]
    prompt = getattr(request, "prompt", None)
    several = isinstance(prompt, list) and len(prompt) > 1 and not isinstance(prompt[0], int)
    if several or any(number > 1 for number in choices):
        raise SteeringRequestError(ONE_PROMPT, PARAM)


def fetching(original: Callable[..., AsyncGenerator[Any, None]]) -> Callable[..., AsyncGenerator[Any, None]]:
    def generate(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        stream = original(self, *args, **kwargs)
        params = args[1] if len(args) > 1 else kwargs.get("sampling_params")
        # A capture that no check resolved is refused where it is resolved: nobody would deliver its rows.
        resolved = checked_steering(getattr(params, "extra_args", None))
        if params is None or resolved is None or resolved.capture is None:
            return stream
        return _fetching(self, resolved.capture, stream, is_delta=params.output_kind == RequestOutputKind.DELTA)

    return generate


async def _fetching(
    async_llm: Any, capture: CaptureRequest, stream: Any, *, is_delta: bool
) -> AsyncGenerator[Any, None]:
    from vllm.exceptions import VLLMValidationError

    note, frontend = current_note.get(), frontend_of(async_llm)
    if note is None or note.report is None or note.captured or frontend is None:
        await stream.aclose()
        raise VLLMValidationError(ONE_PROMPT, parameter=PARAM)
    note.captured = True
    fetched, num_tokens = False, 0
    async with frontend.capture_slots:
        try:
            async with aclosing(stream):
                async for output in stream:
                    new = sum(len(choice.token_ids) for choice in output.outputs)  # of the one answer
                    num_tokens = num_tokens + new if is_delta else new
                    if output.finished and all(choice.finish_reason != "abort" for choice in output.outputs):
                        lengths = len(output.prompt_token_ids), num_tokens
                        rows_LPD = await engine_client.fetch_capture(async_llm, capture.key, capture.end(*lengths))
                        await asyncio.to_thread(deliver, note, capture, rows_LPD, *lengths)
                        fetched = True
                    yield output
        finally:
            if not fetched:
                await _drop(async_llm, capture.key)


def deliver(note: RequestNote, capture: CaptureRequest, rows_LPD: np.ndarray, prompt_len: int, num_tokens: int) -> None:
    """Put captured rows into the note's report: base64 of a safetensors file.

    rows_LPD: float32 [points, positions, D], as the workers return them. num_tokens: of the answer.
    """
    assert note.report is not None
    positions, rows_LPD = capture.arranged(rows_LPD, prompt_len, num_tokens)
    name = "residual" if capture.site is Site.BLOCK else capture.site.value
    tensors = {
        f"{name}.{block}": np.ascontiguousarray(rows) for block, rows in zip(capture.blocks, rows_LPD, strict=True)
    }
    metadata = {
        "format": FORMAT,
        "positions": ",".join(map(str, positions)),
        "edit": "after" if capture.after else "before",
    }
    if capture.site is not Site.BLOCK:
        metadata["site"] = capture.site.value
    if capture.scope != "prompt":
        metadata["scope"] = capture.scope
        metadata["prompt_tokens"] = str(prompt_len)
    if capture.positions == "mean":
        metadata["mean"] = "true"
    data = base64.b64encode(save(tensors, metadata=metadata)).decode("ascii")
    rows = {"positions": positions, "prompt_tokens": prompt_len, "completion_tokens": num_tokens, "data": data}
    note.report["capture"] = note.report["capture"] | rows


async def _drop(async_llm: Any, key: str) -> None:
    """Tell the engines to drop the rows, even if the caller is cancelled once more while it waits."""

    async def drop() -> None:
        try:
            await engine_client.drop_capture(async_llm, key)
        except Exception as error:
            logger.debug("The engine could not drop captured rows: %r", error)  # it has ended

    task = asyncio.ensure_future(drop())
    _dropping.add(task)
    task.add_done_callback(_dropping.discard)
    await asyncio.shield(task)
