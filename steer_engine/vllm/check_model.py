"""Where a server accepts or refuses a request's steering, and how each endpoint's requests reach that point.

Wraps `BaseServing._check_model` and `PoolingBaseServing._check_model`, the one asynchronous step that every endpoint
takes before rendering and before a stream's status line. Known for vLLM 0.32 and 0.33.

Here steering is resolved, once, and its vectors are shipped. The `ResolvedSpec` waits in the request's note; its digest
replaces what the client wrote, so that a request whose note gets lost fails instead of running unsteered (`intake`).
Endpoints that cannot carry steering refuse it here.

Some endpoints need more. `/v1/messages` is answered by the chat handler, but its request class drops unknown fields:
the class is opened, and `AnthropicServingMessages._build_base_request` (wrapped) copies the field. The classes of
`/inference/v1/generate` are opened. `OpenAIServingModels.show_available_models` (wrapped) lists presets as models, and
`OpenAIServingModels.load_lora_adapter` (wrapped) refuses an adapter under the name of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any

from steer_engine.api import metrics
from steer_engine.api.answers import RequestNote, begin_note, current_note, envelope_of, status_of
from steer_engine.api.body_search import search_fields
from steer_engine.api.foreign_forms import XARGS_FORMS, ForeignSteering
from steer_engine.api.frontend import NOT_ARMED, Frontend
from steer_engine.api.request_field import FIELD, SEPARATOR, XARGS, is_absent, split_model, steering_of
from steer_engine.errors import SteerError, SteeringRequestError, UnknownVectorError
from steer_engine.resolve import ResolvedSpec
from steer_engine.spec import MAX_SPEC_CHARS
from steer_engine.vllm import capture_fetch
from steer_engine.vllm.engine_client import ship
from steer_engine.vllm.intake import frontend_of
from steer_engine.vllm.patching import Patch, Symbol, apply

MAX_REFUSAL_CHARS = 200

USED = (
    Symbol("vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat"),
    Symbol("vllm.entrypoints.openai.chat_completion.batch_serving:OpenAIServingChatBatch"),
    Symbol("vllm.entrypoints.openai.completion.serving:OpenAIServingCompletion"),
    Symbol("vllm.entrypoints.scale_out.token_in_token_out.serving:ServingTokens"),
    Symbol("vllm.entrypoints.openai.responses.serving:OpenAIServingResponses"),
    Symbol("vllm.entrypoints.serve.engine.protocol:ErrorResponse"),
    Symbol("vllm.entrypoints.serve.engine.protocol:ErrorInfo"),
    Symbol("vllm.entrypoints.serve.tokenize.serving:ServingTokenization"),
    Symbol("vllm.entrypoints.anthropic.protocol:AnthropicMessagesRequest"),
    Symbol("vllm.entrypoints.scale_out.token_in_token_out.protocol:GenerateRequest"),
    Symbol("vllm.entrypoints.scale_out.token_in_token_out.protocol:GenerateResponseBase"),
    Symbol("vllm.entrypoints.scale_out.token_in_token_out.protocol:GenerateStreamResponseBase"),
)


def serving_frontend(serving: Any) -> Frontend | None:
    """The frontend behind an endpoint's handler; None where it has no engine, or the general plugin is not loaded."""
    return frontend_of(getattr(serving, "engine_client", None) or getattr(serving.models, "engine_client", None))


def _steering(original: Any) -> Any:
    async def _check_model(self: Any, request: Any) -> Any:
        try:
            preset, model = _take_preset(self, request)
        except UnknownVectorError as error:
            metrics.request_refused(status_of(error))
            begin_note().refusal = error
            return _error_response(error)
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
            note.retry_after, note.refusal = getattr(error, "retry_after", None), error
            metrics.request_refused(status_of(error))
            return _error_response(error)
        return None

    return _check_model


def _refusing(original: Any) -> Any:
    async def _check_model(self: Any, request: Any) -> Any:
        begin_note()
        # vLLM's pooling endpoints ignore a returned error: this one must be raised.
        if not is_absent(requested_steering(request)):
            from vllm.exceptions import VLLMValidationError

            raise VLLMValidationError(f"{type(self).__name__} cannot carry steering.", parameter=FIELD)
        return await original(self, request)

    return _check_model


def _take_preset(serving: Any, request: Any) -> tuple[str | None, str | None]:
    """The preset that the request chooses by the model name `BASE:PRESET`, and that name; (None, None) otherwise.

    The base name replaces it on the request.

    Raises:
        UnknownVectorError: the base is served, and it has no such preset, and no adapter has that name. An unknown base
            is left to vLLM.
    """
    note: RequestNote | None = current_note.get()
    model = getattr(request, "model", None) or (note and note.body_model)
    if not isinstance(model, str):
        return None, None
    chosen = _split(serving.models, model)
    frontend = serving_frontend(serving)
    if chosen is None or frontend is None or not frontend.armed:
        return None, None
    base, preset = chosen
    try:
        frontend.registry.preset(preset)
    except UnknownVectorError as error:
        if model in serving.models.lora_requests:
            return None, None
        clipped = model[:MAX_REFUSAL_CHARS]
        raise UnknownVectorError(f"The model {clipped!r} does not exist: {error.message}", "model") from None
    request.model = base
    return preset, model


def _split(models: Any, name: str) -> tuple[str, str] | None:
    """`name` as base or adapter, and preset. An adapter of that very name does not displace the preset."""
    return split_model(name, {path.name for path in models.base_model_paths} | (set(models.lora_requests) - {name}))


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
    if is_absent(requested):
        _remove_field(request)
        return None
    if preset is not None and _only_tokenizes(serving):
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
    resolved = _telling_what_fits(serving, resolved)
    if frontend.queue_limit is not None:
        await frontend.queue_limit.enter()
    if frontend.missing(resolved):
        metrics.shipped_bytes.inc(await ship(serving.engine_client, resolved))
    metrics.request_steered(resolved, time.monotonic() - began)
    _leave(serving, request, resolved.digest)
    return resolved


def _telling_what_fits(serving: Any, resolved: ResolvedSpec) -> ResolvedSpec:
    """`resolved`, without the numbers of its preset where the answer has no place for numbers.

    A client that names no probe may not know that the preset, or the server's default, has one: that is no error.

    Raises:
        SteeringRequestError: the request itself asks for numbers there.
    """
    told = [probe.returns != "none" for probe in resolved.template.probes]
    if not any(told) or not type(serving).__module__.startswith("vllm.entrypoints.anthropic"):
        return resolved
    if any(told[resolved.num_preset_probes :]):
        raise SteeringRequestError(
            "The answers of this endpoint have no place for the numbers of probes; use /v1/chat/completions, or "
            '"return": "none" for stop rules.',
            "steering.probes",
        )
    return resolved.without_numbers()


def requested_steering(request: Any) -> Any:
    """`steering_of` for a request object of vLLM: typed fields, and the extra ones that pydantic kept."""
    note: RequestNote | None = current_note.get()
    if note is None or not note.searched:  # no middleware, as in vLLM's own batch runner
        found = search_fields({**vars(request), **(getattr(request, "__pydantic_extra__", None) or {})})
        if found is not None and found.misplaced:
            raise found.refusal
    return steering_of({key: getattr(request, key, None) for key in (FIELD, XARGS)})


def _has_inline(requested: Any) -> bool:
    if isinstance(requested, ForeignSteering):
        return requested.has_vectors
    if isinstance(requested, str):
        return len(requested) > MAX_SPEC_CHARS
    lists = [requested.get(key) for key in ("edits", "probes")] if isinstance(requested, dict) else []
    holders = [each for found in lists if isinstance(found, list) for each in found]
    return any(isinstance(holder, dict) and isinstance(holder.get("vector"), dict) for holder in holders)


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


def _only_tokenizes(serving: Any) -> bool:
    """Tokens do not depend on steering: `BASE:PRESET` tokenises like its base."""
    from vllm.entrypoints.serve.tokenize.serving import ServingTokenization

    return isinstance(serving, ServingTokenization)


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


def _open_classes() -> None:
    """Let request and answer classes keep extra fields. Must run before vLLM imports the routes, which copy schemas."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.scale_out.token_in_token_out import protocol

    # Choices first: the schemas of answers contain theirs.
    answers = (
        protocol.GenerateChoiceBase,
        protocol.GenerateStreamChoiceBase,
        protocol.GenerateResponseBase,
        protocol.GenerateStreamResponseBase,
    )
    for opened in (
        AnthropicMessagesRequest,
        protocol.GenerateRequest,
        *(each for base in answers for each in base.__subclasses__()),
    ):
        if opened.model_config.get("extra") != "allow":
            opened.model_config["extra"] = "allow"
            opened.model_rebuild(force=True)


def _build_base_request(original: Any) -> Any:
    def build(cls: Any, anthropic_request: Any, openai_messages: Any) -> Any:
        request = original(cls, anthropic_request, openai_messages)
        extra = getattr(anthropic_request, "__pydantic_extra__", None) or {}
        if FIELD in extra:
            setattr(request, FIELD, extra[FIELD])
        return request

    return build


def _with_presets(original: Any) -> Any:
    async def show_available_models(self: Any) -> Any:
        models = await original(self)
        frontend = frontend_of(self)
        if frontend is None or not frontend.armed:
            return models
        bases = {path.name for path in self.base_model_paths}
        presets = list(frontend.registry.presets())
        models.data += [
            card.model_copy(update={"id": f"{card.id}{SEPARATOR}{preset}", "parent": card.id, "permission": []})
            for card in models.data
            if card.id in bases
            for preset in presets
        ]
        return models

    return show_available_models


def _load_lora_adapter(original: Any) -> Any:
    async def load_lora_adapter(self: Any, request: Any, *args: Any, **kwargs: Any) -> Any:
        """Refuse an adapter under a preset's model name: requests for it would get the preset without the adapter."""
        frontend, chosen = frontend_of(self), _split(self, request.lora_name)
        if frontend is not None and frontend.armed and chosen is not None:
            with contextlib.suppress(UnknownVectorError):
                frontend.registry.preset(chosen[1])
                return _error_response(
                    SteeringRequestError(
                        f"{request.lora_name[:MAX_REFUSAL_CHARS]!r} is the model name of a preset; load the adapter "
                        "under another name.",
                        "lora_name",
                    )
                )
        return await original(self, request, *args, **kwargs)

    return load_lora_adapter


_MODELS = "vllm.entrypoints.openai.models.serving:OpenAIServingModels"
PATCHES = (
    Patch(Symbol("vllm.entrypoints.serve.engine.serving:BaseServing._check_model", ("request",)), _steering),
    Patch(Symbol("vllm.entrypoints.pooling.base.serving:PoolingBaseServing._check_model", ("request",)), _refusing),
    Patch(
        Symbol(
            "vllm.entrypoints.anthropic.serving:AnthropicServingMessages._build_base_request",
            ("anthropic_request", "openai_messages"),
        ),
        _build_base_request,
    ),
    Patch(Symbol(f"{_MODELS}.show_available_models"), _with_presets),
    Patch(Symbol(f"{_MODELS}.load_lora_adapter", ("request", "base_model_name")), _load_lora_adapter),
)


def install() -> None:
    _open_classes()
    apply(PATCHES)
