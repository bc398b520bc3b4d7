"""Endpoints that need more than the shared check: their request classes drop unknown fields, or list models.

* `/v1/messages` is answered by the chat handler, but its request class drops unknown fields: the class is opened, and
  `AnthropicServingMessages._build_base_request` (wrapped) copies the field to the chat request.
* `/inference/v1/generate`: its request and answer classes are opened.
* `OpenAIServingModels.show_available_models` (wrapped) lists presets as models, for clients that choose from a list.

Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from typing import Any

from steer_engine.api.request_field import FIELD, MISPLACED, SEPARATOR
from steer_engine.vllm.intake import frontend_of
from steer_engine.vllm.patching import Patch, Symbol, apply

USED = (
    Symbol("vllm.entrypoints.anthropic.protocol:AnthropicMessagesRequest"),
    Symbol("vllm.entrypoints.scale_out.token_in_token_out.protocol:GenerateRequest"),
    Symbol("vllm.entrypoints.scale_out.token_in_token_out.protocol:GenerateResponseBase"),
    Symbol("vllm.entrypoints.scale_out.token_in_token_out.protocol:GenerateStreamResponseBase"),
)


def _open_classes() -> None:
    """Let request and answer classes keep extra fields. Must run before vLLM imports the routes, which copy schemas."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest
    from vllm.entrypoints.scale_out.token_in_token_out import protocol

    answers = (protocol.GenerateResponseBase, protocol.GenerateStreamResponseBase)
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
        for key in (FIELD, *MISPLACED):
            if key in extra:
                setattr(request, key, extra[key])
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


PATCHES = (
    Patch(
        Symbol(
            "vllm.entrypoints.anthropic.serving:AnthropicServingMessages._build_base_request",
            ("anthropic_request", "openai_messages"),
        ),
        _build_base_request,
    ),
    Patch(Symbol("vllm.entrypoints.openai.models.serving:OpenAIServingModels.show_available_models"), _with_presets),
)


def install() -> None:
    _open_classes()
    apply(PATCHES)
