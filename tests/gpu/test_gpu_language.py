"""The whole language of requests on a GPU, on a tiny model: each answer is the oracle's.

Answers are decoded by replayed graphs, and prompts by compiled steps. The specs and comparisons are those of
tests/engines.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from helpers.driving import edit, generate, sampled, steering
from helpers.engines import KERNEL, TINY_BLOCKS, TINY_HIDDEN
from helpers.exactness import (
    AT_SITES,
    BOUND,
    MARKED,
    OPERATIONS,
    PLACES,
    SCHEDULES,
    WINDOWS,
    assert_exact,
    assert_same,
    forced,
)
from helpers.fused import assert_fused_equals_unfused
from helpers.gpu_settings import MOST, REHEARSAL
from helpers.oracle import Oracle
from helpers.oracle_probes import assert_numbers
from helpers.traffic import asks, assert_right, run

from steer_engine import LLM

SHOWN = 1e-2
"""Nats by which an edit moves a token of the answer at least."""
PROBED = [
    {"name": "everywhere", "vector": "r20", "measure": "dot", "scope": "all"},
    {"name": "late", "vector": "r8", "blocks": 1, "after": True},
    {"name": "words", "vector": "r21", "blocks": [0, 2], "scope": {"after": 77, "until": 90}},
    {"name": "attention", "vector": "r22", "blocks": 0, "site": "attn", "measure": "dot"},
]


@pytest.fixture(scope="module")
def bound(tiny: LLM, oracle: Oracle) -> float:
    """What a steered answer may differ by: eight times what a plain one does, since an edited stream is larger."""
    ids, logprobs = sampled(generate(tiny, [MARKED], [None], max_tokens=16)[0])
    noise = float(np.abs(np.subtract(logprobs, forced(oracle, MARKED, ids, None))).max())
    assert noise < MOST, "plain vLLM itself differs from Hugging Face"
    return max(8 * noise, BOUND)


def assert_answer(llm: LLM, oracle: Oracle, spec: dict[str, Any], bound: float) -> None:
    _, moved_T = assert_exact(llm, oracle, spec, bound=bound)
    assert moved_T.max() >= max(SHOWN, 10 * bound)


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(tiny: LLM, oracle: Oracle, bound: float, name: str) -> None:
    """All of them in the prompt, then in an answer."""
    assert_same(tiny, oracle, steering(*OPERATIONS[name]), most=MOST)
    assert_exact(tiny, oracle, steering(*OPERATIONS[name]), bound=bound)


@pytest.mark.parametrize("name", ["add", "mixed order", "gate above", "low_rank", "features set", "rotate"])
def test_preserved_norms(tiny: LLM, oracle: Oracle, name: str) -> None:
    assert_same(tiny, oracle, steering(*OPERATIONS[name], preserve_norm=True), most=MOST)


@pytest.mark.parametrize("name", AT_SITES)
def test_sites(tiny: LLM, oracle: Oracle, bound: float, name: str) -> None:
    assert_same(tiny, oracle, steering(*AT_SITES[name]), most=MOST)
    assert_exact(tiny, oracle, steering(*AT_SITES[name]), bound=bound)


@pytest.mark.parametrize("name", WINDOWS)
def test_triggers_and_windows(tiny: LLM, oracle: Oracle, bound: float, name: str) -> None:
    assert_answer(tiny, oracle, steering(edit("r8", 2.0, scope=WINDOWS[name])), bound)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule["kind"])
@pytest.mark.parametrize("scope", ["all", {"after": 77, "each": True}], ids=str)
def test_schedules(tiny: LLM, oracle: Oracle, bound: float, scope: Any, schedule: dict[str, Any]) -> None:
    assert_answer(tiny, oracle, steering(edit("r8", 2.0, scope=scope, schedule=schedule)), bound)


@pytest.mark.parametrize("measure", ["cosine", "dot"])
@pytest.mark.parametrize("at", PLACES)
def test_conditions(tiny: LLM, oracle: Oracle, bound: float, at: str, measure: str) -> None:
    """Just below and just above the value: the edit applies, or does not."""
    condition = {"vector": "r9", "blocks": [0, 1], "measure": measure, "at": at}
    known = condition | {"above": 0.0}
    value = oracle.decisions(MARKED, steering(edit("r8", 2.0), when=known), len(MARKED)).value(known)
    for above, holds in ((value - 1e-3, True), (value + 1e-3, False)):
        spec = steering(edit("r8", 2.0), when=condition | {"above": above})
        _, moved_T = assert_exact(tiny, oracle, spec, bound=bound)
        assert (moved_T.max() >= SHOWN) == holds


def test_probes(tiny: LLM, oracle: Oracle) -> None:
    """Every number, before and after edits, with and without any; and they change no bit of the answer."""
    edits = [edit("r8", 2.0), edit("r9", 0.7, op="ablate", scope="generation")]
    specs = [None, steering(*edits), steering(*edits, preserve_norm=True)]
    without = [sampled(output) for output in generate(tiny, [MARKED] * 3, specs, max_tokens=8)]
    wanted = [(spec or {}) | {"probes": PROBED} for spec in specs]
    tiny.llm_engine.reset_prefix_cache()
    outputs = generate(tiny, [MARKED] * 3, wanted, max_tokens=8)
    for spec, output in zip(specs, outputs, strict=True):
        choice = output.outputs[0]
        assert_numbers(oracle, MARKED, choice.token_ids, spec, PROBED, choice.steering)
    plain, steered = (outputs[i].outputs[0].steering["probes"]["late"]["1"] for i in (0, 1))
    assert abs(plain[0] - steered[0]) > 1e-2
    assert [ids for ids, _ in without] == [list(output.outputs[0].token_ids) for output in outputs]


def test_a_stop_rule_ends_the_answer_at_its_token(tiny: LLM) -> None:
    """The number comes back to the scheduler in time, also where it runs a step ahead."""
    probe = {"name": "p", "vector": "r20", "blocks": [1], "measure": "dot"}
    free = generate(tiny, [MARKED], [{"probes": [probe]}], max_tokens=16)[0].outputs[0]
    numbers = free.steering["probes"]["p"]["1"]
    ordered = sorted(numbers)
    threshold = (ordered[-2] + ordered[-1]) / 2
    first = next(n for n, number in enumerate(numbers) if number > threshold)
    rule = {"probe": "p", "above": threshold, "for": 1}
    choice = generate(tiny, [MARKED], [{"probes": [probe], "stop": [rule]}], max_tokens=16)[0].outputs[0]
    assert (choice.finish_reason, choice.stop_reason) == ("stop", "probe:p")
    assert list(choice.token_ids) == list(free.token_ids)[: first + 1]
    assert choice.steering["probes"]["p"]["1"] == pytest.approx(numbers[: first + 1], abs=1e-4)


def test_mixed_traffic(tiny: LLM, oracle: Oracle) -> None:
    """Every kind of spec and probe in one batch, with cold and warm prefix caches."""
    requested = asks(26, shared=70)
    for _ in ("cold", "warm"):
        outputs = run(tiny, requested)
        assert_right(oracle, requested, outputs)
    assert sum(output.num_cached_tokens or 0 for output in outputs) > 0


def test_captures(tiny: LLM, oracle: Oracle) -> None:
    """A capture is taken before the edit of the same block, and after those of earlier blocks."""
    spec = steering(edit("r0", 1.5, blocks=1))
    streams = oracle.streams(MARKED, spec)
    ours_LPD = tiny.capture([MARKED], "all", steering=spec)[0]
    assert ours_LPD.shape == (TINY_BLOCKS, len(MARKED), TINY_HIDDEN)
    for block, (before_TD, _) in enumerate(streams):
        assert np.abs(ours_LPD[block] - before_TD.numpy()).max() <= 1e-4 * float(before_TD.abs().max())


@pytest.mark.skipif(REHEARSAL and KERNEL == "torch", reason="without Triton nothing is fused")
@pytest.mark.parametrize("eager", [True, False], ids=["eager", "graphs"])
def test_fused_norm(tiny_llama: str, eager: bool) -> None:
    sizes = {"num_blocks": TINY_BLOCKS, "hidden_size": TINY_HIDDEN, "length": 12}
    assert_fused_equals_unfused(tiny_llama, **sizes, norm=1.0, effect=0.05, eager=eager or REHEARSAL)
