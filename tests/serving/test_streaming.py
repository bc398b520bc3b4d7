"""The final chunks of a stream say what was applied; every other byte is the engine's."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from steer_engine.api.streaming import with_report

REPORT = {"digest": "sha256:00", "edits": [{"name": "cheerful", "scale": 1.5}]}


def event(**chunk: Any) -> str:
    return f"data: {json.dumps(chunk, separators=(',', ':'))}\n\n"


async def collect(*events: str) -> list[str]:
    async def stream() -> AsyncGenerator[str, None]:
        for each in events:
            yield each

    return [each async for each in with_report(stream(), REPORT)]


async def test_only_chunks_with_a_finish_reason_carry_the_report() -> None:
    first = event(choices=[{"index": 0, "delta": {"content": "a"}, "finish_reason": None}])
    last = event(choices=[{"index": 0, "delta": {"content": "b"}, "finish_reason": "stop"}], model="m")
    usage = event(choices=[], usage={"total_tokens": 3})
    done = "data: [DONE]\n\n"
    told = await collect(first, last, usage, done)
    assert told[0] == first
    assert told[2:] == [usage, done]
    assert json.loads(told[1][6:]) == json.loads(last[6:]) | {"steering": REPORT}
    assert told[1].startswith(last[:-3])


async def test_every_final_chunk_of_several_choices_carries_it() -> None:
    lasts = [event(choices=[{"index": i, "text": "a", "finish_reason": "length"}]) for i in range(3)]
    assert all("steering" in json.loads(each[6:]) for each in await collect(*lasts))


async def test_text_that_looks_like_the_end_is_not_the_end() -> None:
    sly = event(choices=[{"index": 0, "text": '"finish_reason":"stop"', "finish_reason": None}])
    nested = event(choices=[{"finish_reason": None, "delta": {"tool": {"finish_reason": "stop"}}}])
    error = event(error={"message": '"finish_reason":"stop"'})
    assert await collect(sly, nested, error) == [sly, nested, error]


async def test_closing_early_closes_the_engine_stream() -> None:
    closed = []

    async def stream() -> AsyncGenerator[str, None]:
        try:
            while True:
                yield event(choices=[])
        finally:
            closed.append(True)

    wrapped = with_report(stream(), REPORT)
    await anext(wrapped)
    await wrapped.aclose()
    assert closed == [True]


@pytest.mark.parametrize("text", ["ü\n", "}\n\n", 'data: {"finish_reason":"stop"}'])
async def test_any_text_survives(text: str) -> None:
    last = event(choices=[{"text": text, "finish_reason": "stop"}])
    (told,) = await collect(last)
    assert json.loads(told[6:])["choices"][0]["text"] == text
