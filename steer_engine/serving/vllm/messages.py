"""Wraps `AnthropicServingMessages._build_base_request` and opens `AnthropicMessagesRequest`. Known for vLLM 0.32, 0.33.

Why: `/v1/messages` is answered by the chat handler, but its own request class drops unknown fields: with extra fields
allowed, `steering` reaches the chat request, and with it the hook that steers. The answer tells by its header only.
"""

from __future__ import annotations

from typing import Any

from steer_engine.runtime.vllm.patching import wrap
from steer_engine.serving.request_field import FIELD, MISPLACED
from steer_engine.serving.vllm import symbols


def hook() -> None:
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
