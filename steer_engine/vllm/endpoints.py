"""Wraps `AnthropicServingMessages._build_base_request` and opens `AnthropicMessagesRequest`. Known for vLLM 0.32, 0.33.

Why: `/v1/messages` is answered by the chat handler, but its own request class drops unknown fields: with extra fields
allowed, `steering` reaches the chat request, and with it the hook that steers. The answer tells by its header only.
"""

from __future__ import annotations

from typing import Any

from steer_engine.api.request_field import FIELD, MISPLACED, SEPARATOR
from steer_engine.vllm import symbols, told
from steer_engine.vllm.patching import wrap


def hook_messages() -> None:
    """Must run before vLLM imports the route, which copies the class's schema."""
    from vllm.entrypoints.anthropic.protocol import AnthropicMessagesRequest

    if AnthropicMessagesRequest.model_config.get("extra") != "allow":
        AnthropicMessagesRequest.model_config["extra"] = "allow"
        AnthropicMessagesRequest.model_rebuild(force=True)
    wrap(symbols.MESSAGES_BASE_REQUEST, _build_base_request)


def _build_base_request(original: Any) -> Any:
    def build(cls: Any, anthropic_request: Any, openai_messages: Any) -> Any:
        request = original(cls, anthropic_request, openai_messages)
        extra = getattr(anthropic_request, "__pydantic_extra__", None) or {}
        for key in (FIELD, *MISPLACED):
            if key in extra:
                setattr(request, key, extra[key])
        return request

    return build


def hook_tokens() -> None:
    """Must run before vLLM imports the route, which copies the classes' schemas."""
    from vllm.entrypoints.scale_out.token_in_token_out import protocol

    # One class of answers for each output mode; 0.33 has one more.
    for opened in (protocol.GenerateRequest, *protocol.GenerateResponseBase.__subclasses__()):
        if opened.model_config.get("extra") != "allow":
            opened.model_config["extra"] = "allow"
            opened.model_rebuild(force=True)
    wrap(symbols.TOKENS_FULL, told.whole(_answer))
    wrap(symbols.TOKENS_STREAM, told.stream)


def _answer() -> Any:
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateResponseBase

    return GenerateResponseBase


def hook_models() -> None:
    wrap(symbols.SHOW_MODELS, _with_presets)


def _with_presets(original: Any) -> Any:
    async def show_available_models(self: Any) -> Any:
        models = await original(self)
        frontend = getattr(self.input_processor, "steering", None)
        if frontend is None or not frontend.armed:
            return models
        bases = {path.name: path for path in self.base_model_paths}
        presets = list(frontend.registry.presets())
        models.data += [
            card.model_copy(update={"id": f"{card.id}{SEPARATOR}{preset}", "parent": card.id, "permission": []})
            for card in models.data
            if card.id in bases
            for preset in presets
        ]
        return models

    return show_available_models


def hook() -> None:
    hook_messages()
    hook_tokens()
    hook_models()
