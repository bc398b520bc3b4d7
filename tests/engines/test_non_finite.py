"""Invariant 11, second line: numbers that are not finite stay with their request, even where admission lets them in."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from helpers.driving import generate, params, sampled, steering, tokens
from helpers.engines import RUNNER
from helpers.traffic import Start

from steer_engine import LLM

# Triton's interpreter computes with numpy, which warns.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{what} encountered:RuntimeWarning") for what in ("overflow", "invalid value")
]

BLOCK = 32
NUM_BLOCKS = 24
NUM = 12 if RUNNER == "v1" else 4
PROMPTS = [tokens(seed, BLOCK + 4) for seed in range(NUM)]
LONG = PROMPTS[0][:BLOCK] + tokens(99, BLOCK - 2)
"""Fills slots of its second block that no answer to PROMPTS writes again. Shares its first block with PROMPTS[0]."""


def overflow(scope: Any) -> dict[str, Any]:
    return steering(*({"vector": name, "op": "set", "target": 3e38, "scope": scope} for name in ("r0", "r1")))


BROKEN_TOKEN = 511
"""Its row of the embeddings becomes NaN in one test. No other prompt has it."""

FROM_SECOND_BLOCK = overflow({"start": BLOCK})


@pytest.fixture(scope="module")
def small(start: Start) -> LLM:
    """An engine with so few KV blocks that each is used again and again."""
    return start(num_gpu_blocks_override=NUM_BLOCKS, max_num_seqs=8)


@pytest.fixture(autouse=True)
def no_first_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Admission lets every number in."""
    for check in ("check_growth", "check_dose", "check_representable"):
        monkeypatch.setattr(f"steer_engine.resolve.{check}", lambda *args, **kwargs: None)


@pytest.fixture
def llm(small: LLM) -> LLM:
    small.llm_engine.reset_prefix_cache()
    return small


def all_finite(llm: LLM) -> bool:
    """Whether every number in the KV cache of every layer is finite."""
    core = llm.llm_engine.engine_core.engine_core
    layers = core.vllm_config.compilation_config.static_forward_context.values()
    caches = [layer.kv_cache for layer in layers if hasattr(layer, "kv_cache")]
    assert caches
    return all(bool(torch.isfinite(cache).all()) for cache in caches)


def plain_answers(llm: LLM) -> list[Any]:
    return [sampled(output) for output in generate(llm, PROMPTS, [None] * NUM)]


def break_one(llm: LLM, spec: dict[str, Any] = FROM_SECOND_BLOCK) -> None:
    assert generate(llm, [LONG], [spec])[0].outputs[0].finish_reason == "error"


def test_only_the_request_itself_ends_with_an_error(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("ERROR", logger="steer_engine.requests"):
        one_in_four_breaks(llm)
    lines = [record.getMessage() for record in caplog.records if record.name == "steer_engine.requests"]
    assert len(lines) == len(range(1, NUM, 4))
    for line in lines:
        assert re.fullmatch(r"Request \S+ ended with an error: its numbers are not finite\. Its edits: \[.+\]", line)


@pytest.mark.slow
@pytest.mark.usefixtures("asynchronous")
def test_the_scheduler_may_be_a_step_ahead(start: Start) -> None:
    """The step after the one that broke is under way, with the request in it, when its numbers are known."""
    llm = start(num_gpu_blocks_override=NUM_BLOCKS, max_num_seqs=8)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert type(scheduler).__name__ == "AsyncScheduler"
    for _ in range(2):
        one_in_four_breaks(llm)
        llm.llm_engine.reset_prefix_cache()
    plain = plain_answers(llm)
    llm.llm_engine.reset_prefix_cache()
    break_one(llm)
    assert plain_answers(llm) == plain
    assert all_finite(llm)


@pytest.mark.slow_on_v2
def test_a_broken_model_is_not_made_worse(llm: LLM, caplog: pytest.LogCaptureFixture) -> None:
    """A plain request whose numbers are not finite ends as in plain vLLM; a steered one beside it goes on."""
    ended = llm.steering_status()["ended_non_finite"]
    plain = plain_answers(llm)
    (row,) = llm.apply_model(lambda model: model.model.embed_tokens.weight.data[BROKEN_TOKEN])
    kept = row.clone()
    row.fill_(torch.nan)
    try:
        with caplog.at_level("ERROR", logger="steer_engine.requests"):
            specs = [None, steering({"vector": "r0"}), None]
            broken, steered, other = generate(llm, [[BROKEN_TOKEN, 1, 2], *PROMPTS[:2]], specs)
        assert [each.outputs[0].finish_reason for each in (broken, steered, other)] == ["length"] * 3
        assert not np.isfinite(sampled(broken)[1]).any()
        assert np.isfinite(sampled(steered)[1]).all()
        assert sampled(other) == plain[1]
        assert not caplog.records
    finally:
        row.copy_(kept)
        clean(llm)
    assert llm.steering_status()["ended_non_finite"] == ended
    llm.llm_engine.reset_prefix_cache()
    assert plain_answers(llm) == plain


def clean(llm: LLM) -> None:
    """What vLLM does not do for plain requests."""
    core = llm.llm_engine.engine_core.engine_core
    for layer in core.vllm_config.compilation_config.static_forward_context.values():
        if hasattr(layer, "kv_cache"):
            layer.kv_cache.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)


def one_in_four_breaks(llm: LLM) -> None:
    plain = plain_answers(llm)
    llm.llm_engine.reset_prefix_cache()
    before = llm.steering_status()["ended_non_finite"]
    mixed = generate(llm, PROMPTS, [overflow("generation") if i % 4 == 1 else None for i in range(NUM)])
    for i, output in enumerate(mixed):
        if i % 4 == 1:
            assert output.outputs[0].finish_reason == "error"
        else:
            assert sampled(output) == plain[i]
    assert llm.steering_status()["ended_non_finite"] - before == len(range(1, NUM, 4))


@pytest.mark.slow_on_v2
def test_later_requests_see_nothing_of_it(llm: LLM) -> None:
    """Plain requests use every KV block again; each answer is the one of a fresh cache, bit for bit."""
    plain = plain_answers(llm)
    llm.llm_engine.reset_prefix_cache()
    for _ in range(2):
        break_one(llm)
        assert plain_answers(llm) == plain
        assert all_finite(llm)


@pytest.mark.slow_on_v2
def test_blocks_before_the_edit_stay_shared(llm: LLM) -> None:
    generate(llm, PROMPTS[:1], [None])
    break_one(llm)
    again = generate(llm, PROMPTS[:1], [None])[0]
    assert again.num_cached_tokens == BLOCK


@pytest.mark.slow_on_v2
def test_a_request_that_shares_a_steered_prefix_goes_on(llm: LLM) -> None:
    """Both read one KV block of the same steering; one breaks behind it, and the other answers as if alone."""
    shared = {"vector": "r2", "scale": 2.0}
    good, broken = steering(shared), steering(shared, *FROM_SECOND_BLOCK["edits"])
    alone = sampled(generate(llm, PROMPTS[:1], [good])[0])
    assert alone != sampled(generate(llm, PROMPTS[:1], [None])[0])
    first, second = generate(llm, [PROMPTS[0], LONG], [good, broken])
    assert (first.num_cached_tokens, second.outputs[0].finish_reason) == (BLOCK, "error")
    assert sampled(first) == alone
    assert all_finite(llm)


@pytest.mark.slow_on_v2
def test_cleaned_blocks_leave_the_prefix_cache(llm: LLM) -> None:
    """Otherwise the same steering would read their zeros."""
    break_one(llm, overflow("all"))
    pool = llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
    assert len(pool.cached_block_hash_to_block) == 0
    generate(llm, [LONG], [None])
    assert len(pool.cached_block_hash_to_block) > 0
    assert all_finite(llm)


def test_a_request_that_was_aborted_meanwhile(llm: LLM) -> None:
    """Its blocks are free before its numbers are known: all free blocks are cleaned."""
    plain = plain_answers(llm)
    engine = llm.llm_engine
    core = engine.engine_core.engine_core
    name = engine.add_request("aborted", {"prompt_token_ids": LONG}, params(FROM_SECOND_BLOCK))
    core.aborts_queue.put_nowait([name])  # vLLM takes it between the forward pass and its output
    engine.step()
    assert name not in core.scheduler.requests
    engine.abort_request(["aborted"])
    assert not all_finite(llm), "it has written what must be cleaned"
    generate(llm, [tokens(5, 3)], [None], max_tokens=1)  # the next step cleans, and writes few slots itself
    assert all_finite(llm)
    assert plain_answers(llm) == plain
