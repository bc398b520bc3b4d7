"""Where a server accepts or refuses a request's steering.

Wraps `BaseServing._check_model` and `PoolingBaseServing._check_model`, the one asynchronous step that every endpoint
takes before rendering and before a stream's status line. Known for vLLM 0.32 and 0.33.

Here steering is resolved, once, and its vectors are shipped. The `ResolvedSpec` waits in the request's note; its digest
replaces what the client wrote, so that a request whose note gets lost fails instead of running unsteered (`intake`).
Endpoints that cannot carry steering refuse it here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any

from steer_engine.api import metrics
from steer_engine.api.answers import RequestNote, begin_note, current_note, envelope_of, status_of
from steer_engine.api.foreign_forms import XARGS_FORMS
from steer_engine.api.frontend import NOT_ARMED, Frontend
from steer_engine.api.request_field import FIELD, MISPLACED, XARGS, split_model, steering_of
from steer_engine.errors import SteerError, SteeringRequestError, UnknownVectorError
from steer_engine.resolve import ResolvedSpec
from steer_engine.vllm import capture_fetch
from steer_engine.vllm.engine_client import ship
from steer_engine.vllm.intake import frontend_of
from steer_engine.vllm.patching import Patch, Symbol, apply

MAX_REFUSAL_CHARS = 200

USED = (
    Symbol("vllm.entrypoints.openai.responses.serving:OpenAIServingResponses"),
    Symbol("vllm.entrypoints.serve.engine.protocol:ErrorResponse"),
    Symbol("vllm.entrypoints.serve.engine.protocol:ErrorInfo"),
)


def serving_frontend(serving: Any) -> Frontend | None:
    """The frontend behind an endpoint's handler; None where it has no engine, or the general plugin is not loaded."""
    return frontend_of(getattr(serving, "engine_client", None) or getattr(serving.models, "engine_client", None))


def _steering(original: Any) -> Any:
    async def _check_model(self: Any, request: Any) -> Any:
        preset, model = _take_preset(self, request)
        refusal = await original(self, request)
        if refusal is not None:
            return _clipped(refusal)
        note = begin_note()
        note.model = model
        try:
            if (frontend := serving_frontend(self)) is not None:
                frontend.drain.check_open()
            note.resolved = await _admit(self, request, preset)
            note.report = None if note.resolved is None else note.resolved.report()
        except SteerError as error:
            note.retry_after = getattr(error, "retry_after", None)
            metrics.request_refused(status_of(error))
            return _error_response(error)
        return None

    return _check_model


def _refusing(original: Any) -> Any:
    async def _check_model(self: Any, request: Any) -> Any:
        begin_note()
        # vLLM's pooling endpoints ignore a returned error: this one must be raised.
        if requested_steering(request) not in (None, False):
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(f"{type(self).__name__} cannot carry steering.", parameter=FIELD)
        return await original(self, request)

    return _check_model


def _take_preset(serving: Any, request: Any) -> tuple[str | None, str | None]:
    """The preset that the request chooses by the model name `BASE:PRESET`, and that name; (None, None) otherwise.

    The base name replaces it on the request. An unknown preset is an unknown model, which vLLM refuses itself.
    """
    note: RequestNote | None = current_note.get()
    model = getattr(request, "model", None) or (note and note.body_model)
    if not isinstance(model, str):
        return None, None
    served = {path.name for path in serving.models.base_model_paths} | set(serving.models.lora_requests)
    chosen = split_model(model, served)
    frontend = serving_frontend(serving)
    if chosen is None or frontend is None or not frontend.armed:
        return None, None
    base, preset = chosen
    try:
        frontend.registry.preset(preset)
    except UnknownVectorError:
        if not request.model:
            request.model = model  # the wrapper removed it; vLLM must see it to refuse it
        return None, None
    request.model = base
    return preset, model


async def _admit(serving: Any, request: Any, preset: str | None) -> ResolvedSpec | None:
    """Resolve the request's steering, ship its vectors, and leave its digest on the request.

    preset: chosen by the model name. None for an unsteered request.
    """
    began = time.monotonic()
    requested = requested_steering(request)
    if preset is not None:
        if requested is not None:
            raise SteeringRequestError(
                f"Steering is specified twice, in '{FIELD}' and by the preset in the model name; specify it once.",
                FIELD,
            )
        requested = {"preset": preset}
    frontend = serving_frontend(serving)
    if requested is None and frontend is not None and frontend.default_preset is not None and _carries(serving):
        requested = {"preset": frontend.default_preset}
    if requested in (None, False):
        _remove_field(request)
        return None
    if not _carries(serving):
        raise SteeringRequestError(f"This endpoint ({type(serving).__name__}) cannot carry steering.", FIELD)
    if getattr(request, "use_beam_search", False):
        raise SteeringRequestError(
            'Beam search cannot be steered; send "steering": false where a default preset is set.', "use_beam_search"
        )
    if frontend is None:
        raise SteeringRequestError(NOT_ARMED, FIELD)
    # Decoding megabytes would block every other request of this process.
    if _has_inline(requested):
        resolved = await asyncio.to_thread(frontend.resolve, requested, can_capture=True)
    else:
        resolved = frontend.resolve(requested, can_capture=True)
    _remove_field(request)
    if resolved is None:
        return None
    if resolved.capture is not None:
        capture_fetch.check_endpoint(serving, request)
    if frontend.queue_limit is not None:
        await frontend.queue_limit.enter()
    if frontend.missing(resolved):
        metrics.shipped_bytes.inc(await ship(serving.engine_client, resolved))
    metrics.request_steered(resolved, time.monotonic() - began)
    _leave(serving, request, resolved.digest)
    return resolved


def requested_steering(request: Any) -> Any:
    """`steering_of` for a request object of vLLM: typed fields, and the extra ones that pydantic kept."""
    fields = {key: getattr(request, key, None) for key in (FIELD, XARGS, *MISPLACED)}
    params = fields["sampling_params"]
    if params is not None and not isinstance(params, Mapping):
        fields["sampling_params"] = {"extra_args": getattr(params, "extra_args", None)}
    return steering_of(fields)


def _has_inline(requested: Any) -> bool:
    edits = requested.get("edits") if isinstance(requested, dict) else None
    return isinstance(edits, list) and any(
        isinstance(edit, dict) and isinstance(edit.get("vector"), dict) for edit in edits
    )


def _remove_field(request: Any) -> None:
    """Remove what the client wrote: the field, and the JSON text among the extra arguments."""
    if extra := getattr(request, "__pydantic_extra__", None):
        extra.pop(FIELD, None)
    xargs = getattr(request, XARGS, None)
    if isinstance(xargs, dict):
        for key in (FIELD, *XARGS_FORMS):
            xargs.pop(key, None)


def _leave(serving: Any, request: Any, digest: str) -> None:
    """Put the digest where vLLM takes a request's extra arguments from."""
    if _takes_tokens(serving):
        params = request.sampling_params
        params.extra_args = {**(params.extra_args or {}), FIELD: digest}
    else:
        request.vllm_xargs = {**(getattr(request, XARGS, None) or {}), FIELD: digest}


def _takes_tokens(serving: Any) -> bool:
    from vllm.entrypoints.scale_out.token_in_token_out.serving import ServingTokens

    return isinstance(serving, ServingTokens)


def _carries(serving: Any) -> bool:
    from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
    from vllm.entrypoints.openai.completion.serving import OpenAIServingCompletion
    from vllm.entrypoints.openai.responses.serving import OpenAIServingResponses

    # Cohere's handler is a chat handler whose own request class drops unknown fields.
    if type(serving).__module__.startswith("vllm.entrypoints.cohere"):
        return False
    carrying = OpenAIServingChat | OpenAIServingCompletion | OpenAIServingResponses
    return isinstance(serving, carrying) or _takes_tokens(serving)


def _clipped(refusal: Any) -> Any:
    """vLLM's own error repeats the whole name of an unknown model, however long it is."""
    if len(refusal.error.message) > MAX_REFUSAL_CHARS:
        refusal.error.message = refusal.error.message[:MAX_REFUSAL_CHARS] + "..."
    return refusal


def _error_response(error: SteerError) -> Any:
    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

    return ErrorResponse(error=ErrorInfo(**envelope_of(error)["error"]))


PATCHES = (
    Patch(Symbol("vllm.entrypoints.serve.engine.serving:BaseServing._check_model", ("request",)), _steering),
    Patch(Symbol("vllm.entrypoints.pooling.base.serving:PoolingBaseServing._check_model", ("request",)), _refusing),
)


def install() -> None:
    apply(PATCHES)
