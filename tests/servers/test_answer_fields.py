"""vLLM's own answer classes carry the report: whole answers, and the final chunks of a stream."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from steer_engine.api.answers import RequestNote, current_note
from steer_engine.vllm.patching import Symbol
from steer_engine.vllm.plugin import register, register_api

REPORT = {"digest": "sha256:00", "edits": [{"name": "cheerful", "scale": 1.5}]}
USAGE = {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3}

CHAT = "vllm.entrypoints.openai.chat_completion.protocol"
COMPLETION = "vllm.entrypoints.openai.completion.protocol"
TOKENS = "vllm.entrypoints.scale_out.token_in_token_out.protocol"


@pytest.fixture(scope="module", autouse=True)
def _patched() -> None:
    register()
    register_api()


@pytest.fixture
def note() -> Iterator[RequestNote]:
    """The note of a steered request."""
    note = RequestNote(report=dict(REPORT))
    token = current_note.set(note)
    yield note
    current_note.reset(token)


def made(path: str, **fields: Any) -> dict[str, Any]:
    """What an instance of vLLM's class is as JSON, the way vLLM's handlers serialise it."""
    instance = Symbol(path).get()(**fields)
    return json.loads(instance.model_dump_json(exclude_unset=True))


def chunk(path: str, finish_reason: str | None, text: str = "a") -> dict[str, Any]:
    """A stream chunk with one choice, constructed from vLLM's classes."""
    module = path.partition(":")[0]
    if module == CHAT:
        delta = Symbol("vllm.entrypoints.generate.base.protocol:DeltaMessage").get()(content=text)
        choice = Symbol(f"{CHAT}:ChatCompletionResponseStreamChoice").get()(
            index=0, delta=delta, finish_reason=finish_reason
        )
        return made(path, model="m", choices=[choice])
    if module == COMPLETION:
        choice = Symbol(f"{COMPLETION}:CompletionResponseStreamChoice").get()(
            index=0, text=text, finish_reason=finish_reason
        )
        return made(path, model="m", choices=[choice])
    choice = Symbol(f"{TOKENS}:GenerateTokensStreamChoice").get()(index=0, token_ids=[7], finish_reason=finish_reason)
    return made(path, request_id="r", choices=[choice])


CHUNKS = (
    f"{CHAT}:ChatCompletionStreamResponse",
    f"{COMPLETION}:CompletionStreamResponse",
    f"{TOKENS}:GenerateTokensStreamResponse",
)
WHOLE = {
    f"{CHAT}:ChatCompletionResponse": {"model": "m", "choices": [], "usage": USAGE},
    f"{COMPLETION}:CompletionResponse": {"model": "m", "choices": [], "usage": USAGE},
    f"{TOKENS}:GenerateTokensResponse": {"request_id": "r", "choices": []},
    f"{TOKENS}:GenerateTextResponse": {"request_id": "r", "choices": []},
}


@pytest.mark.parametrize("path", CHUNKS)
@pytest.mark.parametrize("reason", ["stop", "length"])
def test_only_chunks_with_a_finish_reason_carry_the_report(note: RequestNote, path: str, reason: str) -> None:
    assert "steering" not in chunk(path, None)
    final = chunk(path, reason)
    assert final.pop("steering") == REPORT
    token = current_note.set(None)
    plain = chunk(path, reason)
    current_note.reset(token)
    changing = {"id", "created"}
    assert {key: value for key, value in final.items() if key not in changing} == {
        key: value for key, value in plain.items() if key not in changing
    }


@pytest.mark.parametrize("path", CHUNKS)
def test_a_chunk_of_usage_carries_no_report(note: RequestNote, path: str) -> None:
    fields = {"request_id": "r"} if path.startswith(TOKENS) else {"model": "m"}
    assert "steering" not in made(path, choices=[], usage=USAGE, **fields)


def test_every_final_chunk_of_several_choices_carries_it(note: RequestNote) -> None:
    choice = Symbol(f"{COMPLETION}:CompletionResponseStreamChoice").get()
    for index in range(3):
        last = choice(index=index, text="a", finish_reason="length")
        assert made(f"{COMPLETION}:CompletionStreamResponse", model="m", choices=[last])["steering"] == REPORT


@pytest.mark.parametrize("text", ["ü\n", "}\n\n", 'data: {"finish_reason":"stop"}', '"finish_reason":"stop"'])
def test_any_text_stays_as_it_is(note: RequestNote, text: str) -> None:
    for finish_reason in (None, "stop"):
        made_chunk = chunk(f"{COMPLETION}:CompletionStreamResponse", finish_reason, text)
        assert made_chunk["choices"][0]["text"] == text
        assert ("steering" in made_chunk) == (finish_reason is not None)


@pytest.mark.parametrize("path", WHOLE)
def test_a_whole_answer_carries_the_report(note: RequestNote, path: str) -> None:
    assert made(path, **WHOLE[path])["steering"] == REPORT


@pytest.mark.parametrize("path", WHOLE)
def test_an_unsteered_answer_has_no_field(path: str) -> None:
    for note in (None, RequestNote()):
        token = current_note.set(note)
        answer = made(path, **WHOLE[path])
        current_note.reset(token)
        assert "steering" not in answer


def test_the_answer_names_the_model_as_the_client_did(note: RequestNote) -> None:
    note.model = "base:calm"
    for path in (f"{CHAT}:ChatCompletionResponse", f"{COMPLETION}:CompletionResponse"):
        assert made(path, **WHOLE[path])["model"] == "base:calm"
    for finish_reason in (None, "stop"):
        assert chunk(f"{CHAT}:ChatCompletionStreamResponse", finish_reason)["model"] == "base:calm"


async def test_a_messages_stream_names_the_model_as_the_client_did(note: RequestNote) -> None:
    """vLLM 0.33 writes this stream from chunks, and not from the text of a chat's stream as 0.32 does."""
    handler = Symbol("vllm.entrypoints.anthropic.serving:AnthropicServingMessages").get()
    delta = Symbol("vllm.entrypoints.generate.base.protocol:DeltaMessage").get()(content="a")
    choice = Symbol(f"{CHAT}:ChatCompletionResponseStreamChoice").get()(index=0, delta=delta, finish_reason=None)
    usage = Symbol("vllm.entrypoints.serve.engine.protocol:UsageInfo").get()(**USAGE)
    note.model = "base:calm"
    first = Symbol(f"{CHAT}:ChatCompletionStreamResponse").get()(model="m", choices=[choice], usage=usage)
    takes_chunks = hasattr(handler, "chat_completion_stream_generator_raw")

    async def stream() -> AsyncIterator[Any]:
        yield first if takes_chunks else f"data: {first.model_dump_json(exclude_unset=True)}\n\n"

    converter = handler.message_stream_converter(object.__new__(handler), stream())
    event = await anext(converter)
    assert json.loads(event.partition("data: ")[2])["message"]["model"] == "base:calm", event
    await converter.aclose()


def test_parts_of_an_answer_and_requests_carry_nothing(note: RequestNote) -> None:
    message = made("vllm.entrypoints.openai.chat_completion.protocol:ChatMessage", role="assistant", content="a")
    assert message == {"role": "assistant", "content": "a"}
    request = made(f"{CHAT}:ChatCompletionRequest", model="m", messages=[])
    assert "steering" not in request


def test_an_answer_before_its_captured_rows_is_an_error(note: RequestNote) -> None:
    assert note.report is not None
    path = f"{COMPLETION}:CompletionResponse"
    note.report["capture"] = {"blocks": [1]}
    with pytest.raises(RuntimeError, match="before its captured rows"):
        made(path, **WHOLE[path])
    note.report["capture"] |= {"data": "AAAA"}
    assert made(path, **WHOLE[path])["steering"]["capture"]["data"] == "AAAA"
