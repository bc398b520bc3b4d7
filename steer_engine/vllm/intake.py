"""How a request enters an engine, on a server and offline: its steering is resolved, shipped and compiled here.

Wraps, known for vLLM 0.32 and 0.33:

* `InputProcessor.__init__`: makes the `Frontend`.
* `InputProcessor.process_inputs`: compiles the program, once per prompt, when the prompt's length is known. Refuses a
  request that would end an armed engine.
* `AsyncLLM.add_request`, `LLMEngine.add_request`: put the `ResolvedSpec` into the request's extra arguments, and ship
  its vectors. A server has resolved it by then, and left its digest on the request; others resolve it here.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

from vllm.exceptions import VLLMNotFoundError, VLLMValidationError
from vllm.sampling_params import SamplingParams
from vllm.utils import length_from_prompt_token_ids_or_embeds

from steer_engine.api.answers import current_note
from steer_engine.api.frontend import STEERING_KEY, Frontend, check_reserved_keys
from steer_engine.capture import CaptureRequest
from steer_engine.errors import SteerError, SteeringRequestError, UnknownVectorError
from steer_engine.program import PROGRAM_KEY
from steer_engine.resolve import ResolvedSpec
from steer_engine.settings import SteeringConfig
from steer_engine.vllm import probed
from steer_engine.vllm.engine_client import ship, ship_sync
from steer_engine.vllm.patching import Patch, Symbol, apply
from steer_engine.vllm.supported import PROMPT_LOGPROBS, check_supported, model_shape, refuses_prompt_logprobs
from steer_engine.vllm.tags import make_vocabulary

logger = logging.getLogger("steer_engine.requests")

REPORT = "_steer_engine_report"
"""Attribute of vLLM's output queue of a request: what its answer says about steering, for tracing."""
PROBES = "_steer_engine_probes"
"""The same for its probes."""

USED = (
    Symbol("vllm.sampling_params:SamplingParams"),
    Symbol("vllm.utils:length_from_prompt_token_ids_or_embeds"),
    Symbol("vllm.exceptions:VLLMNotFoundError"),
    Symbol("vllm.exceptions:VLLMValidationError"),
)


def frontend_of(holder: Any) -> Frontend | None:
    """The frontend of an `AsyncLLM`, an `LLMEngine` or another holder of an input processor; None without one."""
    found: Frontend | None = getattr(getattr(holder, "input_processor", None), "steering", None)
    return found


def _init(original: Callable[..., Any]) -> Callable[..., Any]:
    def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
        # First: a configuration that cannot be armed is refused before anything starts.
        self.steering = _make_frontend(vllm_config)
        original(self, vllm_config, *args, **kwargs)
        if self.steering.armed:
            self.steering.vocabulary = make_vocabulary(self.tokenizer, vllm_config)

    return __init__


def _make_frontend(vllm_config: Any) -> Frontend:
    config = SteeringConfig.from_additional_config(vllm_config.additional_config)
    if config is None:
        return Frontend(None, None)
    check_supported(vllm_config)
    frontend = Frontend(config, model_shape(vllm_config, config))
    _ = frontend.monitors  # refused now, if they cannot be measured
    return frontend


def _process_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def process_inputs(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        if self.steering.armed and getattr(params, "prompt_logprobs", None) is not None:
            _check_prompt_logprobs(self.vllm_config)
        request = original(self, request_id, prompt, params, *args, **kwargs)
        sampling = request.sampling_params
        if isinstance(sampling, SamplingParams) and sampling.extra_args:
            max_model_len = self.vllm_config.model_config.max_model_len
            sampling.extra_args = _compile(self.steering, request, max_model_len, bool(kwargs.get("resumable")))
        return request

    return process_inputs


def _check_prompt_logprobs(vllm_config: Any) -> None:
    if refuses_prompt_logprobs(vllm_config):
        raise VLLMValidationError(
            f"{PROMPT_LOGPROBS} Leave it out, or use an engine without adapters.", parameter="prompt_logprobs"
        )


def _compile(frontend: Frontend, request: Any, max_model_len: int, resumable: bool) -> dict[str, Any]:
    sampling = request.sampling_params
    prompt_len = length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
    # vLLM has replaced a missing max_tokens by what fits. The token that reaches the model's limit is the last one.
    max_tokens = max(1, min(sampling.max_tokens, max_model_len - prompt_len))
    try:
        extra_args = frontend.compile(sampling.extra_args, prompt_len, max_tokens)
        if PROGRAM_KEY in extra_args and resumable:
            raise SteeringRequestError("Streaming input cannot be steered: its prompt length changes.", "steering")
        if request.prompt_token_ids is None and "triggers" in extra_args.get(PROGRAM_KEY, ()):
            raise SteeringRequestError("A prompt of embeddings has no tokens for triggers.", "steering")
    except UnknownVectorError as error:
        raise VLLMNotFoundError(error.message) from error
    except SteeringRequestError as error:
        raise VLLMValidationError(error.message, parameter=error.param) from error
    program = extra_args.get(PROGRAM_KEY)
    if program is not None:
        _log(logging.INFO if frontend.log_requests else logging.DEBUG, request.request_id, program)
        capture = program.get("capture")
        if (capture and CaptureRequest.from_wire(capture).reads_prompt) or program.get("measures_prompt"):
            # A position that comes from the cache is never computed, so it could not be captured or measured.
            sampling.skip_reading_prefix_cache = True
    return extra_args


def _log(level: int, request_id: str, program: dict[str, Any]) -> None:
    """One line of JSON per steered request: what is applied where, by digest."""
    if logger.isEnabledFor(level):
        line = {"request_id": request_id, "vectors": program["vectors"], "edits": program["identity"]}
        logger.log(level, "steered %s", json.dumps(line, separators=(",", ":")))


def checked_steering(extra_args: Mapping[str, Any] | None) -> ResolvedSpec | None:
    """The resolved steering of a server's request, whose digest the check left in `extra_args`; None for others."""
    note = current_note.get()
    if note is None or note.resolved is None or not extra_args:
        return None
    return note.resolved if extra_args.get(STEERING_KEY) == note.resolved.digest else None


def _resolved(frontend: Frontend | None, params: Any) -> ResolvedSpec | None:
    """The resolved steering of a request that is about to enter; None if it has none."""
    extra_args = params.extra_args if isinstance(params, SamplingParams) else None
    # A falsy value, such as 0 or "", is not "no steering": resolving refuses it.
    if frontend is None or not extra_args or extra_args.get(STEERING_KEY) is None:
        return None
    check_reserved_keys(extra_args)
    requested, checked = extra_args[STEERING_KEY], checked_steering(extra_args)
    return frontend.resolve(requested) if checked is None else checked


def _with(params: Any, resolved: ResolvedSpec) -> Any:
    """`params` with the resolved spec in place of what was written; the caller's own object does not change."""
    if params.extra_args[STEERING_KEY] is resolved:
        return params
    params = copy.copy(params)
    params.extra_args = {**params.extra_args, STEERING_KEY: resolved}
    return params


def _add_request_async(original: Callable[..., Any]) -> Callable[..., Any]:
    async def add_request(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        resolved = _resolved(frontend_of(self), params)
        if resolved is not None:
            await ship(self, resolved)
            params = _with(params, resolved)
        queue = await original(self, request_id, prompt, params, *args, **kwargs)
        if (queues := probed.current_queue.get()) is not None:
            queues.append(queue)
        note = current_note.get()
        if note is not None and note.report is not None:
            setattr(queue, REPORT, note.report)
            setattr(queue, PROBES, () if note.resolved is None else note.resolved.template.probes)
        return queue

    return add_request


def _add_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_request(self: Any, request_id: str, prompt: Any, params: Any, *args: Any, **kwargs: Any) -> Any:
        resolved = _resolved(frontend_of(self), params)
        if resolved is not None:
            ship_sync(self, resolved)
            params = _with(params, resolved)
        try:
            return original(self, request_id, prompt, params, *args, **kwargs)
        except SteerError:
            # An engine core in this process has refused it, and vLLM would wait for its answer.
            self.abort_request([request_id])
            raise

    return add_request


_PROCESSOR = "vllm.v1.engine.input_processor:InputProcessor"
_REQUEST = ("request_id", "prompt", "params")
PATCHES = (
    Patch(Symbol(f"{_PROCESSOR}.__init__", ("vllm_config",)), _init),
    Patch(Symbol(f"{_PROCESSOR}.process_inputs", (*_REQUEST, "resumable")), _process_inputs),
    Patch(Symbol("vllm.v1.engine.async_llm:AsyncLLM.add_request", _REQUEST), _add_request_async),
    Patch(Symbol("vllm.v1.engine.llm_engine:LLMEngine.add_request", _REQUEST), _add_request),
)


def install() -> None:
    apply(PATCHES)
