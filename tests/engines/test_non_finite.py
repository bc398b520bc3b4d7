"""Invariant 11, second line: numbers that are not finite stay with their request, even where admission lets them in."""

from __future__ import annotations

from typing import Any

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


def test_only_the_request_itself_ends_with_an_error(llm: LLM) -> None:
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
