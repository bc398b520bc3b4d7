"""The one way in for server and offline alike: compiles a request's steering, once per prompt.

Wraps `vllm.v1.engine.input_processor.InputProcessor.{__init__, process_inputs}`. Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

from vllm.exceptions import VLLMNotFoundError, VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.utils import length_from_prompt_token_ids_or_embeds

from steer_engine.api.frontend import STEERING_KEY, Frontend, check_reserved_keys
from steer_engine.errors import SteerError, SteeringRequestError, UnknownVectorError
from steer_engine.program import PROGRAM_KEY
from steer_engine.vllm.engine_client import ship, ship_sync
from steer_engine.vllm.patching import Symbol, wrap

logger = logging.getLogger("steer_engine.requests")

_CLASS = "vllm.v1.engine.input_processor:InputProcessor"
INIT = Symbol(f"{_CLASS}.__init__", ("vllm_config",))
PROCESS_INPUTS = Symbol(f"{_CLASS}.process_inputs", ("request_id", "prompt", "params", "resumable"))
ADD_REQUEST_ASYNC = Symbol("vllm.v1.engine.async_llm:AsyncLLM.add_request", ("request_id", "prompt", "params"))
ADD_REQUEST = Symbol("vllm.v1.engine.llm_engine:LLMEngine.add_request", ("request_id", "prompt", "params"))
SYMBOLS = (
    INIT,
    PROCESS_INPUTS,
    ADD_REQUEST_ASYNC,
    ADD_REQUEST,
    Symbol("vllm.sampling_params:SamplingParams"),
    Symbol("vllm.utils:length_from_prompt_token_ids_or_embeds"),
    Symbol("vllm.exceptions:VLLMNotFoundError"),
    Symbol("vllm.exceptions:VLLMValidationError"),
)


def hook() -> None:
    wrap(INIT, _init)
    wrap(PROCESS_INPUTS, _process_inputs)
    wrap(ADD_REQUEST_ASYNC, _async_add_request)
    wrap(ADD_REQUEST, _add_request)


def _init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        # First: a configuration that cannot be armed is refused before anything is started.
        self.steering = Frontend(vllm_config)
        original(self, vllm_config, *args, **kwargs)

    return __init__


def _process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        request = original(self, request_id, prompt, params, *args, **kwargs)
        sampling = request.sampling_params
        if isinstance(sampling, SamplingParams) and sampling.extra_args:
            # vLLM cloned the params, but not the dict in them: several prompts share it.
            sampling.extra_args = _compile(self.steering, request, bool(kwargs.get("resumable")))
        return request

    return process_inputs


def _compile(frontend: Frontend, request: Any, resumable: bool) -> dict[str, Any]:
    sampling = request.sampling_params
    prompt_len = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
    try:
        extra_args = frontend.compile(sampling.extra_args, prompt_len)
        if PROGRAM_KEY in extra_args and resumable:
            raise SteeringRequestError("Streaming input cannot be steered: its prompt's length changes.", "steering")
        if PROGRAM_KEY in extra_args and sampling.seed is not None:
            _check_seeded(frontend, prompt_len)
    except UnknownVectorError as error:
        raise VLLMNotFoundError(error.message) from error
    except SteeringRequestError as error:
        raise VLLMValidationError(error.message, parameter=error.param) from error
    level = logging.INFO if frontend.log_requests else logging.DEBUG
    _log(level, request.request_id, extra_args.get(PROGRAM_KEY))
    if "capture" in extra_args.get(PROGRAM_KEY, {}):
        # A cached position is never computed, so it could not be read.
        sampling.skip_reading_prefix_cache = True
    return extra_args


def _check_seeded(frontend: Frontend, prompt_len: int) -> None:
    longest = frontend.seeded_tokens
    if longest is not None and prompt_len > longest:
        raise SteeringRequestError(
            f"A prompt of {prompt_len} tokens is read in several steps, and vLLM cannot do that with a seed on this "
            f"device; leave the seed out, or send at most {longest} tokens.",
            "seed",
        )


def _log(level: int, request_id: str, program: dict[str, Any] | None) -> None:
    """One line of JSON for each steered request: what is applied where, by digest."""
    if program is not None and logger.isEnabledFor(level):
        line = {"request_id": request_id, "vectors": program["vectors"], "edits": program["identity"]}
        logger.log(level, "steered %s", json.dumps(line, separators=(",", ":")))


def _async_add_request(original: Callable[..., Any]) -> Callable[..., Any]:
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
