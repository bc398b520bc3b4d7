"""Offline engines: resolve and ship before a request enters.

Wraps `vllm.v1.engine.llm_engine.LLMEngine.add_request`. Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from vllm.sampling_params import SamplingParams

from steer_engine.errors import SteerError
from steer_engine.runtime.vllm.frontend import STEERING_KEY, Frontend, check_reserved_keys
from steer_engine.runtime.vllm.patching import Symbol, wrap
from steer_engine.runtime.vllm.shipping import ship_sync

ADD_REQUEST = Symbol("vllm.v1.engine.llm_engine:LLMEngine.add_request", ("request_id", "prompt", "params"))
SYMBOLS = (ADD_REQUEST,)


def hook() -> None:
    wrap(ADD_REQUEST, _add_request)


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_request(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(params, SamplingParams) and params.extra_args and params.extra_args.get(STEERING_KEY):
            frontend: Frontend = self.input_processor.steering
            check_reserved_keys(params.extra_args)
            resolved = frontend.resolve(params.extra_args[STEERING_KEY])
            if resolved is not None:
                ship_sync(self, frontend.missing(resolved))
                # The names are gone from here on; the caller's own params stay as they are.
                params = params.clone()
                params.extra_args = {**(params.extra_args or {}), STEERING_KEY: resolved.to_wire()}
        try:
            return original(self, request_id, prompt, params, *args, **kwargs)
        except SteerError:
            # An engine core in this process has refused it, and vLLM would wait for its answer.
            self.abort_request([request_id])
            raise

    return add_request
