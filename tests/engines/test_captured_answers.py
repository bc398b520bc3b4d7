"""Rows of generated tokens: one for each token that is returned, whatever the engine does with the batch."""

from __future__ import annotations

import base64
import json
from functools import partial
from typing import Any

import numpy as np
import pytest
from helpers.captured_answers import Scope, assert_rows, capture, captured_bytes
from helpers.counting import counting
from helpers.driving import params, sampled, tokens
from helpers.engines import RUNNER, TINY_BLOCKS
from helpers.oracle import Oracle
from helpers.traffic import SPECS, Ask, Start, asks, core_of, drafts_of, marked, run
from safetensors.numpy import load as load_tensors

from steer_engine import LLM
from steer_engine.api.answers import RequestNote
from steer_engine.capture import CaptureRequest
from steer_engine.errors import SteeringRequestError
from steer_engine.site import Site, points_at
from steer_engine.vllm.capture_fetch import deliver

NUM = 24 if RUNNER == "v1" else 4
SCOPES: tuple[Scope, ...] = ("generation", "all")
PROMPT = tokens(0, 40)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_the_rows_are_those_of_the_oracle(tiny: LLM, oracle: Oracle, scope: Scope, after: bool) -> None:
    requested = asks(NUM)
    outputs = capture(tiny, requested, scope=scope, after=after)
    assert_rows(oracle, requested, outputs, scope=scope, after=after)
    assert captured_bytes(tiny) == 0


@pytest.mark.parametrize("scope", SCOPES)
def test_prompts_in_chunks(start: Start, oracle: Oracle, scope: Scope) -> None:
    llm = start(capture=True, max_num_batched_tokens=16, max_num_seqs=16)
    requested = asks(NUM, shared=20)
    with counting(core_of(llm).scheduler, "schedule") as steps:
        assert_rows(oracle, requested, capture(llm, requested, scope=scope), scope=scope)
    assert len(steps) >= sum(len(ask.prompt) + ask.max_tokens - 1 for ask in requested) / 16


@pytest.mark.slow_on_v2
def test_only_the_rows_of_answers_may_read_the_cache(start: Start, oracle: Oracle) -> None:
    llm = start(capture=True, max_num_seqs=16)
    requested = asks(NUM, shared=70)
    run(llm, requested)
    for scope in SCOPES:
        outputs = capture(llm, requested, scope=scope)
        assert_rows(oracle, requested, outputs, scope=scope)
        cached = sum(output.num_cached_tokens or 0 for output in outputs)
        assert (cached > 32 * NUM / 3) if scope == "generation" else (cached == 0)


@pytest.mark.slow_on_v2
@pytest.mark.parametrize("caching", [False, True])
@pytest.mark.parametrize("scope", SCOPES)
def test_preemption(start: Start, oracle: Oracle, scope: Scope, caching: bool) -> None:
    """Rows of before stay, or are computed again: no gap, and none twice."""
    llm = start(
        capture=True, num_gpu_blocks_override=14, max_num_seqs=8, max_model_len=256, enable_prefix_caching=caching
    )
    num, length = (12, 40) if RUNNER == "v1" else (6, 8)
    requested = [Ask(marked(tokens(900 + i, 60)), SPECS[i % len(SPECS)], length) for i in range(num)]
    with counting(core_of(llm).scheduler, "_preempt_request") as preempted:
        outputs = capture(llm, requested, scope=scope)
    assert_rows(oracle, requested, outputs, scope=scope)
    assert preempted, "nothing was preempted"
    assert captured_bytes(llm) == 0


@pytest.mark.usefixtures("asynchronous")
def test_asynchronous_scheduling(start: Start, oracle: Oracle) -> None:
    """A step is under way when an answer ends: at a stop token, which the scheduler learns of too late."""
    llm = start(capture=True, max_num_batched_tokens=64, max_num_seqs=16)
    assert type(core_of(llm).scheduler).__name__ == "AsyncScheduler"
    requested = asks(NUM)
    assert_rows(oracle, requested, capture(llm, requested))
    assert_stops(llm, oracle)


def test_a_stop_string_or_token_ends_the_rows(tiny: LLM, oracle: Oracle) -> None:
    assert_stops(tiny, oracle)


def assert_stops(llm: LLM, oracle: Oracle) -> None:
    """Answers that end early, at a token and at a string; the engine learns of the string later."""
    ask = Ask(PROMPT, SPECS[1], 8)
    ids = sampled(run(llm, [ask])[0])[0]
    text = llm.get_tokenizer().decode(ids[:4]).rstrip("\ufffd")  # half a character is in no text
    for ending in ({"stop_token_ids": [ids[3]]}, {"stop": [text[-4:]]}):
        output = capture(llm, [ask], **ending)[0]
        assert output.outputs[0].finish_reason == "stop"
        assert 1 <= len(output.outputs[0].token_ids) <= 4 < len(ids)
        assert_rows(oracle, [ask], [output])
    assert captured_bytes(llm) == 0


@pytest.mark.slow_on_v2
def test_drafts(start: Start, oracle: Oracle, tiny_llama: str) -> None:
    """The model drafts for itself, unsteered: drafts of plain requests are taken, most of steered ones rejected."""
    llm = start(capture=True, speculative_config={"model": tiny_llama, "num_speculative_tokens": 3}, max_num_seqs=16)
    assert_drafts(llm, oracle)
    assert_stops(llm, oracle)


@pytest.mark.slow
@pytest.mark.usefixtures("asynchronous")
def test_drafts_under_asynchronous_scheduling(start: Start, oracle: Oracle, tiny_llama: str) -> None:
    """The host counts positions as if every draft had been taken."""
    llm = start(capture=True, speculative_config={"model": tiny_llama, "num_speculative_tokens": 3}, max_num_seqs=16)
    assert type(core_of(llm).scheduler).__name__ == "AsyncScheduler"
    assert_drafts(llm, oracle)
    assert_stops(llm, oracle)


def assert_drafts(llm: LLM, oracle: Oracle) -> None:
    """Some drafts are taken and others rejected, and every row is that of a token that was returned."""
    requested = asks(NUM, max_tokens=12)
    for scope in SCOPES:
        with counting(core_of(llm).scheduler, "schedule") as steps:
            outputs, accepted = drafts_of(llm, requested, partial(capture, scope=scope))
        assert accepted > 0
        assert len(steps) > max(ask.max_tokens for ask in requested) / 4 + 1, "no draft was rejected"
        assert_rows(oracle, requested, outputs, scope=scope)


@pytest.mark.parametrize("scope", SCOPES)
def test_rows_of_a_second_pass_over_the_answer_are_the_same(tiny: LLM, scope: Scope) -> None:
    """What a prompt capture of prompt and answer returns, less the row of the last token, which was never computed."""
    ask = Ask(PROMPT, None, 8)
    output = capture(tiny, [ask], scope=scope)[0]
    whole = [*PROMPT, *output.outputs[0].token_ids]
    again_LPD = tiny.capture([whole], "all")[0][:, len(PROMPT) - 1 if scope == "generation" else 0 : -1]
    assert np.abs(output.captured - again_LPD).max() <= 2e-5 * np.abs(again_LPD).max()


@pytest.mark.parametrize("scope", SCOPES)
def test_the_last_row_and_the_mean(tiny: LLM, scope: Scope) -> None:
    asked = params(None, max_tokens=5)
    found = {
        position: tiny.capture_answers([PROMPT], asked, scope=scope, position=position)[0].captured  # type: ignore[arg-type]
        for position in ("all", "last", "mean")
    }
    assert np.array_equal(found["last"], found["all"][:, -1:])
    mean_L1D = found["all"].mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
    assert np.array_equal(found["mean"], mean_L1D)
    assert found["mean"].shape[:2] == (TINY_BLOCKS, 1)


def test_what_cannot_be_captured_is_refused(tiny: LLM, start: Start) -> None:
    wrong: list[tuple[dict[str, Any], Any, str]] = [
        ({"scope": "prompt"}, None, "use LLM.capture"),
        ({"position": [0]}, None, "'last', 'mean' or 'all'"),
        ({}, params(None, n=2, temperature=1.0), "repeat the prompt"),
        ({}, params({"capture": {}}), "LLM.capture_answers"),
    ]
    for arguments, asked, told in wrong:
        with pytest.raises(SteeringRequestError, match=told):
            tiny.capture_answers([PROMPT], asked, **arguments)
    with pytest.raises(SteeringRequestError, match="capture=True"):
        start(max_num_seqs=16).capture_answers([PROMPT])


def test_a_call_that_is_interrupted_leaves_no_rows(tiny: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    engine, kept = tiny.llm_engine, []
    step = engine.step

    def interrupted() -> Any:
        kept.append(captured_bytes(tiny))
        if len(kept) == 4:
            raise KeyboardInterrupt
        return step()

    monkeypatch.setattr(engine, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        capture(tiny, [Ask(PROMPT, None, 12)], scope="all")
    monkeypatch.undo()
    assert kept[-1] > 0
    assert captured_bytes(tiny) == 0
    while engine.has_unfinished_requests():
        engine.step()
    assert captured_bytes(tiny) == 0


@pytest.mark.parametrize(("site", "name"), [(Site.BLOCK, "residual"), (Site.MLP, "mlp")])
def test_a_servers_answer_names_the_site(site: Site, name: str) -> None:
    """The file in the answer: a tensor for each block, under the name of what was captured."""
    capture = CaptureRequest(key="k", positions=(0, 2), points=points_at((0, 2), site))
    note = RequestNote(report={"capture": capture.report()})
    rows_LPD = np.arange(8, dtype=np.float32).reshape(2, 2, 2)
    deliver(note, capture, rows_LPD, 3, 1)
    assert note.report is not None
    told = note.report["capture"]
    data = base64.b64decode(told["data"])
    assert told.get("site") == (None if site is Site.BLOCK else "mlp")
    tensors = load_tensors(data)
    assert {key: rows.tolist() for key, rows in tensors.items()} == {
        f"{name}.0": rows_LPD[0].tolist(), f"{name}.2": rows_LPD[1].tolist()
    }  # fmt: skip
    metadata = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    assert metadata.get("site") == told.get("site")
    assert metadata["positions"] == "0,2"
