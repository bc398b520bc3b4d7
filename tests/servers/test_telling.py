"""What was applied enters the report with vLLM's own outputs, in whatever way they are merged on their way."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from typing import Any

import pytest
from helpers.random_specs import resolved
from vllm.outputs import CompletionOutput, RequestOutput

from steer_engine.applied import Applied
from steer_engine.vllm.measured import KEY
from steer_engine.vllm.reports import attributes_of
from steer_engine.vllm.telling import _telling

PROMPT = [5, 6, 7]
SPEC = {"edits": [{"vector": "a"}], "when": {"vector": "c", "blocks": 0, "above": 0.25}}


def output(index: int, tokens: list[int], *, ends: bool = False, numbers: list[float] | None = None) -> RequestOutput:
    choice = CompletionOutput(
        index=index, text="", token_ids=tokens, cumulative_logprob=None, logprobs=None,
        finish_reason="length" if ends else None,
    )  # fmt: skip
    found = RequestOutput(
        request_id="r", prompt="", prompt_token_ids=PROMPT, prompt_logprobs=None, outputs=[choice], finished=False
    )
    found.kv_transfer_params = None if numbers is None else {KEY: numbers}
    return found


def merged(*outputs: RequestOutput, finished: bool = False) -> RequestOutput:
    """As vLLM's collector merges what waits for its reader."""
    first, *rest = outputs
    for each in rest:
        first.add(each, aggregate=True)
    first.finished = finished
    return first


async def told(spec: dict[str, Any], *outputs: RequestOutput) -> list[dict[str, Any]]:
    """The report after each output."""

    async def stream() -> AsyncGenerator[RequestOutput, None]:
        for each in outputs:
            yield each

    found = resolved(spec)
    report = found.report()
    seen = []
    async for each in _telling(stream(), Applied(found, report), is_delta=True):
        assert each.kv_transfer_params is None
        seen.append({"applied": report["edits"][0].get("applied_tokens"), **report.get("conditions", [{}])[0]})
    return seen


async def test_a_sequence_that_finishes() -> None:
    last = merged(output(0, [2], ends=True, numbers=[0.5]), finished=True)
    seen = await told(SPEC, output(0, [8]), output(0, [9]), last)
    assert [each["applied"] for each in seen] == [None, None, 3]
    assert (seen[-1]["value"], seen[-1]["held"]) == (0.5, True)


@pytest.mark.parametrize("held", [True, False])
async def test_numbers_that_a_later_output_has_replaced(held: bool) -> None:
    """The first choice ends while the second goes on, before anyone has read the output."""
    number = 0.5 if held else 0.0
    both = merged(output(0, [8, 9], ends=True, numbers=[number]), output(1, [8]))
    last = merged(output(1, [9], ends=True, numbers=[number]), finished=True)
    seen = await told(SPEC, both, last)
    assert seen[0]["applied"] is None
    assert seen[-1]["applied"] == (4 if held else 0)
    assert seen[-1]["value"] == [number, number]
    assert seen[-1]["held"] == [held, held]


async def test_without_conditions_nothing_waits() -> None:
    first = output(0, [8, 9], ends=True)
    seen = await told({"edits": [{"vector": "a"}]}, first, merged(output(1, [8], ends=True), finished=True))
    assert [each["applied"] for each in seen] == [4, 7]


async def test_numbers_that_never_come() -> None:
    seen = await told(SPEC, merged(output(0, [8, 9], ends=True), finished=True))
    assert seen[-1]["applied"] is None
    assert "value" not in seen[-1]


def test_a_span_has_the_numbers_of_a_few_probes() -> None:
    report = {"digest": "d", "edits": [], "probes": [{"name": "p", "vector": "v"}]}
    summaries = {"p": {str(block): {"mean": block / 2, "max": None, "tokens": 3} for block in range(40)}}
    found = attributes_of(report, summaries, "probe:p")
    assert found["steer_engine.probes"] == ["p"]
    assert found["steer_engine.probe_vectors"] == ["v"]
    assert found["steer_engine.stopped_by"] == "p"
    assert found["steer_engine.probe.p.31.mean"] == 15.5
    assert "steer_engine.probe.p.32.mean" not in found
    assert None not in found.values(), "a span has no empty attribute"
    plain = attributes_of(report | {"probes": []}, None, "</s>")
    assert plain.keys() == {f"steer_engine.{key}" for key in ("digest", "names", "vectors", "edits")}
