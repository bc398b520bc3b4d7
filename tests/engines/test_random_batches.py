"""Random batches of random steering: each request gets what it gets alone, whatever runs beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.driving import edit, steering
from helpers.engines import RUNNER, SETTINGS, assert_meant, kept
from helpers.oracle import Oracle
from helpers.random_batches import Answer, Request, alone, random_batch, run_together, unsteered
from helpers.random_specs import BY_DIGEST, HIDDEN_SIZE, NUM_BLOCKS, ROW_SETS, VECTORS, specs
from helpers.tiny_models import tiny_llama_path
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from steer_engine import LLM
from steer_engine.settings import SteeringConfig
from steer_engine.spec import DIRECTIONAL, Op

LARGEST, LARGEST_OF_SHORT, LONGEST, SHORT_RUN, LONG_RUN = (64, 64, 8, 3, 40) if RUNNER == "v1" else (64, 4, 2, 1, 1)
"""Requests in a batch of the long test and of the short one, tokens of an answer, and batches of either."""

SURE = steering(edit("a", 1.5, scope="all"))
"""A part of every batch: all the random specs of one may do nothing."""

EPSILON = float(np.finfo(np.float32).eps)
NEAR_A_GATE = 1e-4
"""A number so near the bound of its gate or feature that rounding may decide; its request is compared with nothing."""

Batch = tuple[list[dict[str, Any]], int]
batches = st.tuples(st.lists(specs(max_edits=3, ops=tuple(Op)), min_size=4, max_size=8), st.integers(0, 2**32 - 1))
"""Specs, and the seed of everything else."""


@pytest.fixture(scope="module")
def model(tiny_models_dir: Path) -> str:
    """A random Llama of the shape that random specs are for."""
    return str(tiny_llama_path(tiny_models_dir, num_blocks=NUM_BLOCKS, hidden_size=HIDDEN_SIZE, head_dim=32))


@pytest.fixture(scope="module")
def llm(model: str) -> LLM:
    """Prompts are split, requests wait for others, and the cache is small enough that blocks are thrown out."""
    slots = {"max_num_seqs": 48, "max_num_batched_tokens": 160, "num_gpu_blocks_override": 96}
    engine = LLM(
        model,
        vectors=VECTORS | ROW_SETS,
        steering=SteeringConfig(rows=8),
        enforce_eager=True,
        dtype="float32",
        **SETTINGS | slots,
    )
    assert_meant(engine, num_blocks=NUM_BLOCKS)
    return kept(engine)


@pytest.fixture(scope="module")
def oracle(model: str) -> Oracle:
    return Oracle(model, VECTORS | BY_DIGEST, ROW_SETS)


def check(llm: LLM, oracle: Oracle, drawn: Batch, largest: int) -> None:
    """One batch: steered, and with nobody steered, which says how far vLLM itself is from alone in these shapes."""
    pool, seed = drawn
    rng = np.random.default_rng(seed)
    batch = random_batch(rng, [SURE, *pool], int(rng.integers(largest // 2, largest + 1)), LONGEST)
    llm.llm_engine.reset_prefix_cache()
    plain = run_together(llm, unsteered(batch))
    llm.llm_engine.reset_prefix_cache()
    steered = run_together(llm, batch)
    own = max(far(answer, alone(llm, request, answer, None)) for request, answer in zip(batch, plain, strict=True))
    size = max(float(np.abs(answer.logprobs).max()) for answer in steered)
    bound = 2 * max(own, 32 * EPSILON * size)
    assert bound < 2e-4, "plain vLLM itself depends on the batch"
    for request, answer in zip(batch, steered, strict=True):
        assert np.isfinite(answer.logprobs).all()
        assert len(answer.ids) == request.max_tokens or request.abort is not None
        expected, closest_gate = effect(oracle, request, answer)
        if closest_gate < NEAR_A_GATE:
            continue
        assert far(answer, alone(llm, request, answer, request.spec)) <= bound, request
        COMPARED.append(len(answer.logprobs))
        if request.spec is None:
            continue
        moved = far(answer, alone(llm, request, answer, None))
        assert abs(moved - expected) <= max(0.01 * expected, 100 * bound), (
            f"the oracle moves by {expected:.2g}: {request}"
        )
        EFFECTS.append(moved / bound)
        OPERATIONS.update(Op(edit["op"]) for edit in request.spec["edits"] if "op" in edit)
    CACHED.append(sum(answer.cached for answer in steered))


def far(answer: Answer, logprobs: np.ndarray) -> float:
    return float(np.abs(answer.logprobs - logprobs).max())


def effect(oracle: Oracle, request: Request, answer: Answer) -> tuple[float, float]:
    """How far the oracle's logprobs of the answer move by its steering, and how near a cosine came to its gate."""
    oracle.closest_gate = np.inf
    whole = [*request.prompt, *answer.ids]
    rows = np.arange(len(whole) - 1)
    steered, plain = (
        oracle.logprobs(whole, spec, len(request.prompt))[rows, whole[1:]] for spec in (request.spec, None)
    )
    answered = slice(None) if request.scores_prompt else slice(len(request.prompt) - 1, None)
    return float(np.abs(steered - plain)[answered].max()), float(oracle.closest_gate)


COMPARED: list[int] = []
EFFECTS: list[float] = []
"""Of each steered request that was compared, in bounds of equality; 0 where the oracle too says that nothing moves."""
CACHED: list[int] = []
OPERATIONS: set[Op] = set()
"""Of the steered requests that were compared."""

REPEATABLE = settings(
    derandomize=True,
    phases=[Phase.generate],  # making a failure smaller would take minutes of engine time
    suppress_health_check=[HealthCheck.too_slow],
)


@settings(REPEATABLE, max_examples=SHORT_RUN)
@given(drawn=batches)
def test_each_request_is_as_it_is_alone(llm: LLM, oracle: Oracle, drawn: Batch) -> None:
    check(llm, oracle, drawn, LARGEST_OF_SHORT)


@pytest.mark.slow
@pytest.mark.timeout(900)
@settings(REPEATABLE, max_examples=LONG_RUN)
@given(drawn=batches)
def test_many_more_batches(llm: LLM, oracle: Oracle, drawn: Batch) -> None:
    check(llm, oracle, drawn, LARGEST)


def test_the_batches_were_worth_it() -> None:
    """Nearly all were compared, most steered ones visibly, some behind blocks that another one had made.

    What moves nothing by its own words (a scale of 0, a gate that stays shut) was compared with the oracle too.
    """
    print(f"{len(COMPARED)} compared, {len(EFFECTS)} steered, {sum(effect < 100 for effect in EFFECTS)} not visibly")
    assert len(COMPARED) >= 0.8 * SHORT_RUN * LARGEST_OF_SHORT // 2
    many = len(COMPARED) > SHORT_RUN * LARGEST_OF_SHORT
    assert np.mean(np.array(EFFECTS) >= 100) >= (0.8 if many else 0.9)
    assert np.median(EFFECTS) >= 1000
    assert RUNNER == "v2" or min(CACHED) > 0
    assert RUNNER == "v2" or OPERATIONS - set(DIRECTIONAL)
    assert not many or OPERATIONS.issuperset(Op)
