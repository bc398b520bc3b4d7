"""The model that a request names: `BASE:PRESET` becomes the base for vLLM, and stands in the answer as it was asked."""

from __future__ import annotations

import asyncio
import inspect
import time
from collections.abc import Callable, Mapping
from typing import Any

from steer_engine.api import answers, metrics
from steer_engine.api.answers import envelope_of, status_of
from steer_engine.api.foreign_forms import XARGS_FORMS
from steer_engine.api.request_field import FIELD, MISPLACED, XARGS, split_model, steering_of
from steer_engine.capture import CAPTURE_KEY
from steer_engine.errors import SteerError, SteeringRequestError, UnknownVectorError
from steer_engine.vllm import capture_fetch, symbols
from steer_engine.vllm.patching import wrap

_ASKED = "_steer_engine_asked_model"
"""Attribute of a request object; set past pydantic, so that no dump shows it."""


def frontend_of(serving: Any) -> Any:
    """The `Frontend` behind a handler; None where it has no engine, or the general plugin is not loaded."""
    client = getattr(serving, "engine_client", None) or getattr(serving.models, "engine_client", None)
    return getattr(getattr(client, "input_processor", None), "steering", None)


def take_preset(serving: Any, request: Any) -> str | None:
    """The preset that the request chooses by its model's name; the name left on the request is then vLLM's own.

    An unknown preset is an unknown model: vLLM answers that, with the names that it has.
    """
    note = answers.current.get()
    model = getattr(request, "model", None) or (note and note.model)
    if not isinstance(model, str):
        return None
    served = {path.name for path in serving.models.base_model_paths} | set(serving.models.lora_requests)
    chosen = split_model(model, served)
    frontend = frontend_of(serving)
    if chosen is None or frontend is None or not frontend.armed:
        return None
    base, preset = chosen
    try:
        frontend.registry.preset(preset)
    except UnknownVectorError:
        if not request.model:
            request.model = model  # the wrapper took it off: vLLM must see it to refuse it
        return None
    object.__setattr__(request, _ASKED, model)
    request.model = base
    return preset


def tell_asked_model(original: Callable[..., Any], request: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Call `original(*args, **kwargs)` with its parameter `model_name` as the client asked for it."""
    asked = getattr(request, _ASKED, None)
    if asked is None:
        return original(*args, **kwargs)
    bound = inspect.signature(original).bind(*args, **kwargs)
    bound.arguments["model_name"] = asked
    return original(*bound.args, **bound.kwargs)


REPORT = "_steer_engine_report"
"""Attribute of a request object: the `steering` object of its answer. Set past pydantic, so that no dump shows it."""

MAX_REFUSAL_CHARS = 200


def hook() -> None:
    wrap(symbols.CHECK_MODEL, _steering)
    wrap(symbols.POOLING_CHECK_MODEL, _refusing)


def report_of(request: Any) -> dict[str, Any] | None:
    """What the answer to `request` says about steering; None where none was asked."""
    capture_fetch.check_delivered(request)
    report: dict[str, Any] | None = getattr(request, REPORT, None)
    return report


def _steering(original: Any) -> Any:
    async def _check_model(self: Any, request: Any) -> Any:
        preset = take_preset(self, request)
        refusal = await original(self, request)
        if refusal is not None:
            return _clipped(refusal)
        note = answers.begin()
        try:
            if (frontend := frontend_of(self)) is not None:
                frontend.door.refuse_if_closed()
            note.report = await _steer(self, request, preset)
        except SteerError as error:
            note.retry_after = getattr(error, "retry_after", None)
            metrics.request_refused(status_of(error))
            return _error_response(error)
        if note.report is not None:
            object.__setattr__(request, REPORT, note.report)
        return None

    return _check_model


def _refusing(original: Any) -> Any:
    async def _check_model(self: Any, request: Any) -> Any:
        answers.begin()
        # vLLM's pooling endpoints ignore a returned error: this one has to be raised.
        if steering_asked(request) not in (None, False):
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(f"{type(self).__name__} cannot carry steering.", parameter=FIELD)
        return await original(self, request)

    return _check_model


async def _steer(serving: Any, request: Any, preset: str | None) -> dict[str, Any] | None:
    """Resolve and ship what `request` asks, and leave it by digests in `vllm_xargs`. Returns the report.

    preset: chosen by the model's name.
    """
    began = time.monotonic()
    asked = steering_asked(request)
    if preset is not None:
        if asked is not None:
            raise SteeringRequestError(
                f"Steering is asked twice, in '{FIELD}' and by the preset in the model's name; give one of them.", FIELD
            )
        asked = {"preset": preset}
    frontend = frontend_of(serving)
    if asked is None and frontend is not None and frontend.default_preset is not None and _carries(serving):
        asked = {"preset": frontend.default_preset}
    if asked in (None, False):
        _forget(request)
        return None
    if not _carries(serving):
        raise SteeringRequestError(f"This endpoint ({type(serving).__name__}) cannot carry steering.", FIELD)
    if getattr(request, "use_beam_search", False):
        raise SteeringRequestError(
            'Beam search cannot be steered; send "steering": false where a default preset is set.', "use_beam_search"
        )
    if frontend is None:
        raise SteeringRequestError("This server is not armed for steering; start it with 'steer-engine serve'.", FIELD)
    # Decoding megabytes would hold up every other request of this process.
    if _has_inline(asked):
        resolved = await asyncio.to_thread(frontend.resolve, asked, returns=True)
    else:
        resolved = frontend.resolve(asked, returns=True)
    _forget(request)
    if resolved is None:
        return None
    report: dict[str, Any] = resolved.report()
    extra: dict[str, Any] = {FIELD: resolved.to_wire()} if resolved.edits else {}
    if resolved.capture is not None:
        extra[CAPTURE_KEY] = capture_fetch.admit(frontend, serving, request, resolved.capture, report)
    if frontend.queue_length is not None:
        await frontend.queue_length.enter()
    if missing := frontend.missing(resolved):
        from steer_engine.vllm.engine_client import ship

        metrics.shipped_bytes.inc(await ship(serving.engine_client, missing))
    metrics.request_steered(resolved, time.monotonic() - began)
    _leave(serving, request, extra)
    return report


def steering_asked(request: Any) -> Any:
    """`steering_of` for a request object of vLLM: typed fields, and the extra ones that pydantic kept."""
    fields = {key: getattr(request, key, None) for key in (FIELD, XARGS, *MISPLACED)}
    params = fields["sampling_params"]
    if params is not None and not isinstance(params, Mapping):
        fields["sampling_params"] = {"extra_args": getattr(params, "extra_args", None)}
    return steering_of(fields)


def _has_inline(asked: Any) -> bool:
    edits = asked.get("edits") if isinstance(asked, dict) else None
    return isinstance(edits, list) and any(
        isinstance(edit, dict) and isinstance(edit.get("vector"), dict) for edit in edits
    )


def _forget(request: Any) -> None:
    """Take the client's spelling off the request: the field, and the JSON text among the extra arguments."""
    if extra := getattr(request, "__pydantic_extra__", None):
        extra.pop(FIELD, None)
    xargs = getattr(request, XARGS, None)
    if isinstance(xargs, dict):
        for key in (FIELD, *XARGS_FORMS):
            xargs.pop(key, None)


def _leave(serving: Any, request: Any, extra: dict[str, Any]) -> None:
    """Put what is asked where vLLM takes a request's extra arguments from."""
    if _takes_tokens(serving):
        params = request.sampling_params
        params.extra_args = {**(params.extra_args or {}), **extra}
    else:
        request.vllm_xargs = {**(getattr(request, XARGS, None) or {}), **extra}


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
    """vLLM's own error says the whole name of a model that it does not know, however long that is."""
    if len(refusal.error.message) > MAX_REFUSAL_CHARS:
        refusal.error.message = refusal.error.message[:MAX_REFUSAL_CHARS] + "..."
    return refusal


def _error_response(error: SteerError) -> Any:
    from vllm.entrypoints.serve.engine.protocol import ErrorInfo, ErrorResponse

    return ErrorResponse(error=ErrorInfo(**envelope_of(error)["error"]))
