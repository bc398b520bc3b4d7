"""A shutdown answers every request.

Wraps `vllm.v1.engine.async_llm.AsyncLLM.{shutdown, generate}`. Known for vLLM 0.32 and 0.33.

vLLM stops its engine first. Then a request between its check and the engine comes back aborted, as a 200 without
tokens; output that the server has not read is lost; new requests get a 500; and requests that outlive
`--shutdown-timeout` get no answer at all. Here the drain gate closes first (503 for new requests), the engine runs
until all requests are answered or the time is up, the remaining ones get an error, and then the engine ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from steer_engine.api.answers import current_note
from steer_engine.api.gates import RETRY_AFTER_SECONDS, SHUTTING_DOWN, DrainGate
from steer_engine.vllm import capture_fetch, telling
from steer_engine.vllm.intake import frontend_of
from steer_engine.vllm.patching import Patch, Symbol, apply

OPEN_SECONDS = 1.0
"""Minimum time in which new requests get a 503 before the port closes, within `--shutdown-timeout`."""

LINGER_SECONDS = 0.3
"""How long the port stays open after the last answer, so that a client's next request gets a 503, not a reset."""

NOTIFY_SECONDS = 2.0
"""Reserved from `--shutdown-timeout` (at most a quarter) to end the remaining requests: with several API processes,
their parent kills them when the time is up."""

SIGNAL_SECONDS = 0.5
"""An engine that receives the signal first (Ctrl-C reaches every process) aborts requests; this process follows
soon."""

_POLL_SECONDS = 0.02

logger = logging.getLogger(__name__)

USED = (
    Symbol("vllm.exceptions:VLLMClientError"),
    Symbol("vllm.exceptions:GracefulHTTPError.__init__", ("message", "http_status")),
    Symbol("vllm.v1.engine.async_llm:AsyncLLM.abort", ("request_id", "internal")),
    Symbol("vllm.v1.engine.output_processor:OutputProcessor.abort_requests", ("request_ids", "internal")),
    Symbol("vllm.v1.engine.output_processor:OutputProcessor.get_num_unfinished_requests"),
)


def _draining(original: Any) -> Any:
    def shutdown(self: Any, timeout: float | None = None) -> None:
        began = time.monotonic()
        gate, loop = _gate_of(self), _loop_of(self)
        # The event loop cannot wait for itself; it comes here too, when no request is left.
        waits = gate is not None and not gate.closed and bool(timeout) and not _is_current(loop)
        if gate is not None:
            gate.close()
            if waits and timeout is not None:
                reserved = min(NOTIFY_SECONDS, timeout / 4)
                _wait_for_requests(self, gate, min(OPEN_SECONDS, timeout), timeout - reserved)
                _end_remaining(self, loop)
                timeout = max(0.0, timeout - (time.monotonic() - began))
        original(self, timeout=timeout)
        if gate is not None:
            _end_remaining(self, loop)

    return shutdown


def _wait_for_requests(async_llm: Any, gate: DrainGate, at_least: float, at_most: float) -> None:
    """Wait until every request has its answer, and a little longer; bounds in seconds."""
    began = last_busy = time.monotonic()
    logger.info("Shutting down: %d requests are running.", gate.running)
    while (now := time.monotonic()) - began < at_most:
        if gate.running or async_llm.output_processor.get_num_unfinished_requests():
            last_busy = now
        elif now - began >= at_least and now - last_busy >= LINGER_SECONDS:
            return
        time.sleep(_POLL_SECONDS)


def _end_remaining(async_llm: Any, loop: Any) -> None:
    """End unfinished requests: each `generate` sees that it was cut."""
    remaining = list(async_llm.output_processor.request_states)
    if not remaining or loop is None or loop.is_closed():
        return
    logger.warning("Shutting down: %d requests did not finish in time and get a 503.", len(remaining))
    if _is_current(loop):
        async_llm.output_processor.abort_requests(remaining, internal=True)
        return
    try:
        asyncio.run_coroutine_threadsafe(async_llm.abort(remaining, internal=True), loop).result(NOTIFY_SECONDS / 2)
    except Exception as error:
        logger.debug("The engine could not abort the remaining requests: %r", error)  # it ends anyway


def _ending_with_503(original: Any) -> Any:
    """During a shutdown, a request that fails or is cut short gets a 503, or an error in its stream."""

    async def outputs(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        from vllm.exceptions import GracefulHTTPError, VLLMClientError

        gate = _gate_of(self)
        try:
            async with aclosing(original(self, *args, **kwargs)) as stream:
                async for output in stream:
                    if gate is not None and _is_cut(output) and await _closes_soon(gate):
                        raise _shutting_down()
                    yield output
        except VLLMClientError:
            raise
        except Exception as error:
            if gate is None or not gate.closed:
                raise
            if (note := current_note.get()) is not None:
                note.retry_after = RETRY_AFTER_SECONDS
            if isinstance(error, GracefulHTTPError):
                raise
            raise _shutting_down() from error

    return outputs


def _is_cut(output: Any) -> bool:
    return any(choice.finish_reason == "abort" for choice in output.outputs)


async def _closes_soon(gate: DrainGate) -> bool:
    deadline = time.monotonic() + SIGNAL_SECONDS
    while not gate.closed and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_SECONDS)
    return gate.closed


def _shutting_down() -> Exception:
    from vllm.exceptions import GracefulHTTPError

    error: Exception = GracefulHTTPError(SHUTTING_DOWN, HTTPStatus.SERVICE_UNAVAILABLE)
    return error


def _gate_of(async_llm: Any) -> DrainGate | None:
    """The drain gate of an armed engine's client."""
    frontend = frontend_of(async_llm)
    return frontend.drain if frontend is not None and frontend.armed else None


def _loop_of(async_llm: Any) -> Any:
    """The event loop of the running requests; None before the first request."""
    handler = getattr(async_llm, "output_handler", None)
    return None if handler is None else handler.get_loop()


def _is_current(loop: Any) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False


_ASYNC_LLM = "vllm.v1.engine.async_llm:AsyncLLM"
PATCHES = (
    Patch(Symbol(f"{_ASYNC_LLM}.shutdown", ("timeout",)), _draining),
    Patch(
        Symbol(f"{_ASYNC_LLM}.generate", ("prompt", "sampling_params", "request_id")),
        lambda original: _ending_with_503(telling.telling(capture_fetch.fetching(original))),
    ),
)


def install() -> None:
    apply(PATCHES)
