"""Wraps `ServingTokens.serve_tokens_{full,stream}_generator` and opens the classes of `/inference/v1/generate`.

Why: tokens in, tokens out, for routers and trainers. Its own request class drops unknown fields and has no
`vllm_xargs`; with extra fields allowed `steering` reaches the hook that steers, and the answer can say what was
applied. Known for vLLM 0.32, 0.33.
"""

from __future__ import annotations

from typing import Any

from steer_engine.runtime.vllm.patching import wrap
from steer_engine.serving.vllm import symbols, telling


def hook() -> None:
    """Must run before vLLM imports the route, which copies the classes' schemas."""
    from vllm.entrypoints.scale_out.token_in_token_out import protocol

    # One class of answers for each output mode; 0.33 has one more.
    for opened in (protocol.GenerateRequest, *protocol.GenerateResponseBase.__subclasses__()):
        if opened.model_config.get("extra") != "allow":
            opened.model_config["extra"] = "allow"
            opened.model_rebuild(force=True)
    wrap(symbols.TOKENS_FULL, telling.whole(_answer))
    wrap(symbols.TOKENS_STREAM, telling.stream)


def _answer() -> Any:
    from vllm.entrypoints.scale_out.token_in_token_out.protocol import GenerateResponseBase

    return GenerateResponseBase
