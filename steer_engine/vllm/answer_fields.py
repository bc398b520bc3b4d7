"""The one place where answers say what was applied: the classes of vLLM's answers are constructed here.

Wraps the constructors of `OpenAIBaseModel` (chat, completion and responses answers derive from it) and of the two base
classes of `/inference/v1/generate`. An answer of a steered request gets the field `steering`: every whole answer, and
every stream chunk with a `finish_reason`. The model is named as the client named it. Known for vLLM 0.32 and 0.33.

The request's note is found by its context variable, which vLLM's tasks inherit.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from steer_engine.api.answers import RequestNote, current_note
from steer_engine.vllm.patching import Patch, Symbol, apply

_CHAT = "vllm.entrypoints.openai.chat_completion.protocol"
_COMPLETION = "vllm.entrypoints.openai.completion.protocol"
_TOKENS = "vllm.entrypoints.scale_out.token_in_token_out.protocol"

WHOLE = (
    Symbol(f"{_CHAT}:ChatCompletionResponse"),
    Symbol(f"{_COMPLETION}:CompletionResponse"),
    Symbol("vllm.entrypoints.openai.responses.protocol:ResponsesResponse"),
    Symbol(f"{_TOKENS}:GenerateResponseBase"),
)
CHUNKS = (
    Symbol(f"{_CHAT}:ChatCompletionStreamResponse"),
    Symbol(f"{_COMPLETION}:CompletionStreamResponse"),
    Symbol(f"{_TOKENS}:GenerateStreamResponseBase"),
)
USED = (*WHOLE, *CHUNKS)


@cache
def _classes() -> tuple[tuple[type, ...], tuple[type, ...]]:
    return tuple(symbol.get() for symbol in WHOLE), tuple(symbol.get() for symbol in CHUNKS)


def _init(original: Any) -> Any:
    def __init__(self: Any, /, **data: Any) -> None:
        note = current_note.get()
        # Unsteered answers, the common case, pay for this test only.
        if note is not None and note.report is not None:
            _add(self, data, note, note.report)
        original(self, **data)

    return __init__


def _add(answer: Any, data: dict[str, Any], note: RequestNote, report: dict[str, Any]) -> None:
    whole, chunks = _classes()
    is_chunk = isinstance(answer, chunks)
    if not is_chunk and not isinstance(answer, whole):
        return
    if note.model is not None and "model" in data:
        data["model"] = note.model
    if is_chunk and not any(choice.finish_reason for choice in data.get("choices", ())):
        return
    capture = report.get("capture")
    if not is_chunk and capture is not None and "data" not in capture:
        raise RuntimeError("An answer was made before its captured rows were fetched.")
    data["steering"] = report


PATCHES = (
    Patch(Symbol("vllm.entrypoints.serve.engine.protocol:OpenAIBaseModel.__init__"), _init),
    Patch(Symbol(f"{_TOKENS}:GenerateResponseBase.__init__"), _init),
    Patch(Symbol(f"{_TOKENS}:GenerateStreamResponseBase.__init__"), _init),
)


def install() -> None:
    apply(PATCHES)
