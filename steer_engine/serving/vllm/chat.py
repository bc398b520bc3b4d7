"""Wraps `OpenAIServingChat.chat_completion_{full,stream}_generator` and `OpenAIServingChatBatch`'s full generator.

Why: the answer of a steered request says what was applied. Known for vLLM 0.32; in 0.33 the stream's text goes through
`chat_completion_stream_generator_raw`, below the one wrapped here.
"""

from __future__ import annotations

from typing import Any

from steer_engine.runtime.vllm.patching import wrap
from steer_engine.serving.vllm import symbols, telling


def hook() -> None:
    wrap(symbols.CHAT_FULL, telling.whole(_answer))
    wrap(symbols.CHAT_STREAM, telling.stream)
    wrap(symbols.CHAT_BATCH_FULL, telling.whole(_answer))


def _answer() -> Any:
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionResponse

    return ChatCompletionResponse
