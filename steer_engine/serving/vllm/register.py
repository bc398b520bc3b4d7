"""Sets every hook of the API side, in processes that make an `AsyncLLM`, and in no engine or worker process.

Wraps `vllm.v1.engine.async_llm.AsyncLLM.__init__`: every front end (`vllm serve`, `run-batch`, Ray Serve) makes one
before it builds its routes, and importing the routes of vLLM costs seconds that workers need not spend. Known for
vLLM 0.32, 0.33.
"""

from __future__ import annotations

from typing import Any

from steer_engine.runtime.vllm.patching import check_symbols, wrap
from steer_engine.serving.vllm import symbols


def register() -> None:
    """Called by the general plugin in every process."""
    wrap(symbols.ASYNC_LLM_INIT, _init)


def _init(original: Any) -> Any:
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        hook_serving()
        original(self, *args, **kwargs)

    return __init__


def hook_serving() -> None:
    """Check vLLM's API side and wrap it. Safe to call more than once.

    Raises:
        UnsupportedEngineError: this vLLM is not as expected; says what differs.
    """
    import vllm

    from steer_engine.serving.vllm import (
        chat,
        check_model,
        completion,
        messages,
        models,
        responses,
        shutdown,
        tokens,
        tracing,
    )

    check_symbols(symbols.ALL, vllm.__version__)
    for module in (check_model, models, chat, completion, responses, messages, tokens, tracing, shutdown):
        module.hook()
