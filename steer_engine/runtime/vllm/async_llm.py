"""Servers and other users of `AsyncLLM`: resolve and ship before a request enters.

The server has done so by then (before a stream's status line); this is for callers without it, such as batch runners.
Wraps `vllm.v1.engine.async_llm.AsyncLLM.add_request`. Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.sampling_params import SamplingParams

from steer_engine.runtime.vllm.frontend import STEERING_KEY, Frontend, check_reserved_keys
from steer_engine.runtime.vllm.patching import Symbol, wrap
from steer_engine.runtime.vllm.shipping import ship

ADD_REQUEST = Symbol("vllm.v1.engine.async_llm:AsyncLLM.add_request", ("request_id", "prompt", "params"))
SYMBOLS = (ADD_REQUEST,)


def hook() -> None:
    wrap(ADD_REQUEST, _add_request)


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    async def add_request(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(params, SamplingParams) and params.extra_args and params.extra_args.get(STEERING_KEY):
            frontend: Frontend = self.input_processor.steering
            check_reserved_keys(params.extra_args)
            resolved = frontend.resolve(params.extra_args[STEERING_KEY])
            if resolved is not None:
                await ship(self, frontend.missing(resolved))
                params = params.clone()
                params.extra_args = {**(params.extra_args or {}), STEERING_KEY: resolved.to_wire()}
        return await original(self, request_id, prompt, params, *args, **kwargs)

    return add_request
