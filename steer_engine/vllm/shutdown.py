"""Wraps `vllm.v1.engine.async_llm.AsyncLLM.{shutdown, generate}`. Known for vLLM 0.32, 0.33.

Why: vLLM stops its engine first. A request that is between its admission and the engine by then comes back aborted, as
a 200 without a token; what the engine has written and the server has not read is lost; new requests get a 500; and who
is left when `--shutdown-timeout` is up hears nothing until the client gives up. Here the door is closed first (503),
the engine goes on until everybody inside is answered or the time is up, who is left is told, and then the engine ends.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from http import HTTPStatus
from typing import Any

from steer_engine.api import answers
from steer_engine.api.drain import RETRY_AFTER_S, SHUTTING_DOWN, Door
from steer_engine.vllm import capture_fetch, symbols
from steer_engine.vllm.patching import wrap

OPEN_SECONDS = 1.0
"""How long at least new requests hear a 503 before the port is closed, within `--shutdown-timeout`."""

LINGER_SECONDS = 0.3
"""How long the port stays open after the last answer: who has just got it hears a 503 to its next request, not a reset
connection."""

TELLING_SECONDS = 2.0
"""Kept of `--shutdown-timeout` (at most a quarter of it) to tell who is left: with several API processes, their parent
kills them when it is up."""

SIGNAL_SECONDS = 0.5
"""An engine that hears of the end first (Ctrl-C reaches every process) aborts requests; this process soon knows why."""

_POLL_SECONDS = 0.02

logger = logging.getLogger(__name__)


def hook() -> None:
    wrap(symbols.ASYNC_LLM_SHUTDOWN, _draining)
    wrap(symbols.ASYNC_LLM_GENERATE, lambda original: _told_of_the_end(capture_fetch.fetching(original)))


def _draining(original: Any) -> Any:
    def shutdown(self: Any, timeout: float | None = None) -> None:
        began = time.monotonic()
        door, loop = _door_of(self), _loop_of(self)
        # The event loop can't wait for itself; it comes here too, when nobody is left.
        waits = door is not None and not door.closed and bool(timeout) and not _runs_here(loop)
        if door is not None:
            door.close()
        if waits and timeout is not None:
            _wait_for_all(self, door, min(OPEN_SECONDS, timeout), timeout - min(TELLING_SECONDS, timeout / 4))
            _tell_who_is_left(self, loop)
            timeout = max(0.0, timeout - (time.monotonic() - began))
        original(self, timeout=timeout)
        if door is not None:
            _tell_who_is_left(self, loop)

    return shutdown


def _wait_for_all(async_llm: Any, door: Any, at_least: float, at_most: float) -> None:
    """Until every request has its answer and a little longer, for at least and at most so many seconds."""
    began = last_busy = time.monotonic()
    logger.info("Shutting down: %d requests are under way.", door.inside)
    while (now := time.monotonic()) - began < at_most:
        if door.inside or async_llm.output_processor.get_num_unfinished_requests():
            last_busy = now
        elif now - began >= at_least and now - last_busy >= LINGER_SECONDS:
            return
        time.sleep(_POLL_SECONDS)


def _tell_who_is_left(async_llm: Any, loop: Any) -> None:
    """End what is unfinished: each `generate` sees that it was cut."""
    left = list(async_llm.output_processor.request_states)
    if not left or loop is None or loop.is_closed():
        return
    logger.warning("Shutting down: %d requests did not finish in time and are answered with 503.", len(left))
    if _runs_here(loop):
        async_llm.output_processor.abort_requests(left, internal=True)
        return
    try:
        asyncio.run_coroutine_threadsafe(async_llm.abort(left, internal=True), loop).result(TELLING_SECONDS / 2)
    except Exception as error:
        logger.debug("The engine was not told: %r", error)  # it ends anyway


def _told_of_the_end(original: Any) -> Any:
    """While the server shuts down, what fails or is cut short does so because of that: a 503, an error in a stream."""

    async def outputs(self: Any, *args: Any, **kwargs: Any) -> AsyncGenerator[Any, None]:
        from vllm.exceptions import GracefulHTTPError, VLLMClientError

        door = _door_of(self)
        try:
            async with aclosing(original(self, *args, **kwargs)) as stream:
                async for output in stream:
                    if door is not None and _is_cut(output) and await _closes_soon(door):
                        raise _shutting_down()
                    yield output
        except VLLMClientError:
            raise
        except Exception as error:
            if door is None or not door.closed:
                raise
            if (note := answers.current.get()) is not None:
                note.retry_after = RETRY_AFTER_S
            if isinstance(error, GracefulHTTPError):
                raise
            raise _shutting_down() from error

    return outputs


def _is_cut(output: Any) -> bool:
    return any(choice.finish_reason == "abort" for choice in output.outputs)


async def _closes_soon(door: Door) -> bool:
    deadline = time.monotonic() + SIGNAL_SECONDS
    while not door.closed and time.monotonic() < deadline:
        await asyncio.sleep(_POLL_SECONDS)
    return door.closed


def _shutting_down() -> Exception:
    from vllm.exceptions import GracefulHTTPError

    error: Exception = GracefulHTTPError(SHUTTING_DOWN, HTTPStatus.SERVICE_UNAVAILABLE)
    return error


def _door_of(async_llm: Any) -> Door | None:
    """The door of an armed engine's client."""
    frontend = getattr(getattr(async_llm, "input_processor", None), "steering", None)
    return frontend.door if frontend is not None and frontend.armed else None


def _loop_of(async_llm: Any) -> Any:
    """The event loop that waits for the requests; None before the first."""
    handler = getattr(async_llm, "output_handler", None)
    return None if handler is None else handler.get_loop()


def _runs_here(loop: Any) -> bool:
    try:
        return asyncio.get_running_loop() is loop
    except RuntimeError:
        return False
