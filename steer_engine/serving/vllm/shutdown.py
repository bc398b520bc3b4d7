"""Wraps `vllm.v1.engine.async_llm.AsyncLLM.shutdown`. Known for vLLM 0.32, 0.33.

Why: vLLM lets requests under way finish for `--shutdown-timeout` seconds, but answers new ones with a 500 meanwhile,
and those that are left when the time is up hear nothing until their clients give up. Here new requests get a 503, and
what is left is told.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from steer_engine.runtime.vllm.patching import wrap
from steer_engine.serving.vllm import symbols

logger = logging.getLogger(__name__)


def hook() -> None:
    wrap(symbols.ASYNC_LLM_SHUTDOWN, _draining)


def _draining(original: Any) -> Any:
    def shutdown(self: Any, *args: Any, **kwargs: Any) -> None:
        frontend = getattr(getattr(self, "input_processor", None), "steering", None)
        if frontend is not None:
            frontend.draining = True
        _make_errors_503(self)
        original(self, *args, **kwargs)
        _tell_who_is_left(self)

    return shutdown


def _make_errors_503(async_llm: Any) -> None:
    """From now on whatever fails does so because of the shutdown; the engine's end would read as its death, a 500."""
    processor = getattr(async_llm, "output_processor", None)
    if processor is not None:
        propagate = processor.propagate_error
        processor.propagate_error = lambda error: propagate(_shutting_down())


def _shutting_down() -> Exception:
    from vllm.exceptions import GracefulHTTPError

    message = "This server is shutting down; try another one."
    error: Exception = GracefulHTTPError(message, HTTPStatus.SERVICE_UNAVAILABLE)
    return error


def _tell_who_is_left(async_llm: Any) -> None:
    # The handler's task belongs to the event loop that waits for the requests; shutdown may run in another thread.
    handler = getattr(async_llm, "output_handler", None)
    if handler is None or handler.get_loop().is_closed():
        return
    left = async_llm.output_processor.get_num_unfinished_requests()
    if left:
        logger.warning("Shutting down: %d requests did not finish in time and are answered with 503.", left)
        handler.get_loop().call_soon_threadsafe(async_llm.output_processor.propagate_error, _shutting_down())
