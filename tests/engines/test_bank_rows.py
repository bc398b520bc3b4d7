"""A bank of two vectors, and many concurrent requests with a vector each: all are steered right, and some wait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from helpers.driving import edit, generate, params, sampled, score, steering, tokens
from helpers.engines import RUNNER, SETTINGS, TINY_BLOCKS, kept, random_vector

from steer_engine import LLM
from steer_engine.errors import SteeringRequestError
from steer_engine.program import PROGRAM_KEY
from steer_engine.settings import SteeringConfig

NUM_REQUESTS = 64 if RUNNER == "v1" else 16
BANK_ROWS = 2 * TINY_BLOCKS


@pytest.fixture(scope="module")
def narrow(tiny_llama: str) -> LLM:
    """Room for two vectors at all blocks; up to 32 requests at once."""
    llm = LLM(
        tiny_llama,
        vectors={f"r{seed}": random_vector(seed, norm=3.0) for seed in range(NUM_REQUESTS)},
        steering=SteeringConfig(bank_rows=BANK_ROWS),
        enforce_eager=True,
        dtype="float32",
        max_num_batched_tokens=512,
        **SETTINGS,
    )
    return kept(llm)


@pytest.fixture
def seen(narrow: LLM) -> Iterator[list[tuple[int, int]]]:
    """After each step: rows pinned in the worker, and steered requests that wait."""
    core = narrow.llm_engine.engine_core.engine_core
    counts: list[tuple[int, int]] = []
    step = core.step_fn

    def counted() -> Any:
        result = step()
        counts.append((worker(narrow)["bank_rows_pinned"], core.steer("waiting", [])))
        return result

    core.step_fn = counted
    yield counts
    core.step_fn = step


def worker(llm: LLM) -> dict[str, Any]:
    return dict(llm.steering_status()["workers"][0])


def test_each_of_many_vectors_at_once_is_right(narrow: LLM, seen: list[tuple[int, int]]) -> None:
    assert worker(narrow)["bank_rows"] == BANK_ROWS
    prompts = [tokens(500 + i, 5 + i % 4) for i in range(NUM_REQUESTS)]
    specs = [steering(edit(f"r{i}")) for i in range(NUM_REQUESTS)]
    together = generate(narrow, prompts, specs, max_tokens=3)
    pinned, waiting = zip(*seen, strict=True)
    assert max(pinned) == BANK_ROWS
    assert max(waiting) >= NUM_REQUESTS - 4
    assert waiting[-1] == 0
    narrow.llm_engine.reset_prefix_cache()
    plain = generate(narrow, prompts, [None] * NUM_REQUESTS, max_tokens=3)
    # Re-scored one by one in an empty engine: the tokens of each are as likely as its own vector makes them.
    for i in range(0, NUM_REQUESTS, 1 if RUNNER == "v1" else 5):
        ids, logprobs = sampled(together[i])
        whole, start = [*prompts[i], *ids], len(prompts[i]) - 1
        narrow.llm_engine.reset_prefix_cache()
        expected = score(narrow, [whole], [specs[i]])[0][start:]
        assert np.abs(np.subtract(logprobs, expected)).max() <= 1e-4
        assert np.abs(np.subtract(logprobs, sampled(plain[i])[1])).max() >= 1e-2


def test_unsteered_requests_and_equal_vectors_do_not_wait(narrow: LLM, seen: list[tuple[int, int]]) -> None:
    prompts = [tokens(600 + i, 6) for i in range(9)]
    one = steering(edit("r1"))
    generate(narrow, prompts, [one, None, one, None, one, None, one, None, one], max_tokens=2)
    assert max(waiting for _, waiting in seen) == 0
    assert max(pinned for pinned, _ in seen) == TINY_BLOCKS


def test_a_request_that_could_never_fit_is_refused(narrow: LLM) -> None:
    spec = steering(*[edit(f"r{i}", scope={"start": i}) for i in range(3)])
    with pytest.raises(SteeringRequestError, match="--steering-bank-rows") as caught:
        generate(narrow, [tokens(1, 8)], [spec])
    assert caught.value.param == "steering.edits"
    fits = steering(*[edit(f"r{i}", scope={"start": i}) for i in range(2)])
    assert len(generate(narrow, [tokens(1, 8)], [fits], max_tokens=2)[0].outputs[0].token_ids) == 2


def test_the_engine_core_refuses_a_request_that_could_never_fit(narrow: LLM, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second check, for a request that did not pass through a front end of this process."""
    frontend = narrow.llm_engine.input_processor.steering
    wide = type(frontend.model)(**{**vars_of(frontend.model), "bank_rows": None})
    monkeypatch.setattr(frontend, "_model", wide)
    spec = steering(*[edit(f"r{i}", scope={"start": i}) for i in range(3)])
    with pytest.raises(SteeringRequestError, match="wait forever"):
        generate(narrow, [tokens(1, 8)], [spec])
    assert not narrow.llm_engine.has_unfinished_requests()


def test_aborted_requests_free_their_rows(narrow: LLM) -> None:
    engine = narrow.llm_engine
    for i in range(6):
        wanted = params(steering(edit(f"r{i}")), max_tokens=40)
        engine.add_request(f"goes{i}", {"prompt_token_ids": tokens(i, 6)}, wanted)
    for _ in range(3):
        engine.step()
    assert engine.engine_core.engine_core.steer("waiting", []) == 4
    engine.abort_request([f"goes{i}" for i in range(6)])
    while engine.has_unfinished_requests():
        engine.step()
    assert PROGRAM_KEY not in repr(engine.engine_core.engine_core.scheduler.requests)
    generate(narrow, [tokens(9, 6)] * 2, [steering(edit("r7")), steering(edit("r8"))], max_tokens=2)
    generate(narrow, [tokens(9, 6)], [None], max_tokens=1)
    assert worker(narrow)["bank_rows_pinned"] == 0
    assert worker(narrow)["steered_slots"] == 0


def vars_of(model: Any) -> dict[str, Any]:
    return {name: getattr(model, name) for name in model.__dataclass_fields__}
