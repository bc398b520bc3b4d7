"""A plan is reused exactly while it is valid. `test_engine_runtime` checks that it rounds as the reference does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers.stepping import batch, edited, new_runtime, program, route, stream
from steer_kernels.cpu_plan import StepPlan
from steer_kernels.reference import edit_residual_reference, route_rows_reference

from steer_engine.engine.runtime import EngineRuntime
from steer_engine.program import Program

PROMPT_LEN = 4
ROWS = 6


@pytest.fixture
def plans_made(monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """All plans computed so far."""
    plans: list[StepPlan] = []
    of_step = StepPlan.of_step
    monkeypatch.setattr(StepPlan, "of_step", lambda *args: plans.append(of_step(*args)) or plans[-1])
    return plans


def run_step(runtime: EngineRuntime, *requests: tuple[int, int, int], tokens: Sequence[int] = ()) -> None:
    """Run a step of these (slot, position, rows) and compare every site with the reference on freshly routed tables."""
    measured_SQ = runtime.tables.measured_SQ
    before_SQ = measured_SQ.clone()
    route(runtime, *requests, tokens=tokens)
    hidden, carried = stream(rows=ROWS)
    actual = [edited(runtime, hidden, carried, site) for site in range(len(runtime.armed_blocks))]
    query_start_loc_B1, idx_mapping_B, positions_T, _, num_tokens = batch(*requests)
    actual_SQ = measured_SQ.clone()
    measured_SQ.copy_(before_SQ)
    route_rows_reference(query_start_loc_B1, idx_mapping_B, positions_T, runtime.tables, num_tokens)
    for site, after in enumerate(actual):
        expected = carried.clone()
        edit_residual_reference(hidden, expected, runtime.tables, site, adds_only=False)
        assert torch.equal(after, expected)
    assert torch.equal(actual_SQ, measured_SQ)


def decode(runtime: EngineRuntime, position: int, *slots: int, tokens: Sequence[int] = ()) -> None:
    """A step in which each slot has one row."""
    run_step(runtime, *((slot, position, 1) for slot in slots), tokens=tokens)


def test_decoding_steps_share_one_plan(plans_made: list[StepPlan]) -> None:
    runtime = new_runtime()
    runtime.admit(1, program({}))
    runtime.admit(2, program({"op": "ablate", "scope": "generation"}, prompt_len=PROMPT_LEN))
    for position in range(PROMPT_LEN, 12):
        decode(runtime, position, 1, 0, 2)
    assert len(plans_made) == 1


CHANGES: list[tuple[str, Callable[[EngineRuntime], None]]] = [
    ("another request in the first row", lambda runtime: decode(runtime, 5, 2, 1)),
    ("one request fewer", lambda runtime: decode(runtime, 5, 1)),
    ("one more request, unsteered", lambda runtime: decode(runtime, 5, 1, 2, 0)),
    ("an edit begins", lambda runtime: decode(runtime, 8, 1, 2)),
    ("an edit has not begun", lambda runtime: decode(runtime, 2, 1, 2)),
    ("an edit ends", lambda runtime: decode(runtime, 20, 1, 2)),
    ("one request without rows, one with two", lambda runtime: run_step(runtime, (1, 5, 0), (2, 5, 2))),
    ("one more request, without rows", lambda runtime: run_step(runtime, (1, 5, 1), (2, 5, 1), (0, 5, 0))),
    ("prefill again", lambda runtime: run_step(runtime, (1, 5, 2), (2, 5, 1))),
]

STARTS_AND_ENDS = program({}, {"vector": "b", "scope": {"start": 3, "end": 20}}, {"vector": "c", "scope": {"start": 8}})


@pytest.mark.parametrize("change", [change for _, change in CHANGES], ids=[name for name, _ in CHANGES])
def test_a_change_makes_a_new_plan(plans_made: list[StepPlan], change: Callable[[EngineRuntime], None]) -> None:
    runtime = new_runtime()
    runtime.admit(1, STARTS_AND_ENDS)
    runtime.admit(2, program({"op": "ablate"}))
    decode(runtime, 5, 1, 2)
    decode(runtime, 6, 1, 2)
    assert len(plans_made) == 1
    change(runtime)
    assert len(plans_made) == 2


@pytest.mark.parametrize("other", [program({"scale": -2.0}), program({"op": "ablate"}), program({"vector": "b"})])
def test_another_program_in_the_same_slot_makes_a_new_plan(plans_made: list[StepPlan], other: Program) -> None:
    """A plan must not be reused only because the slot numbers are equal."""
    runtime = new_runtime()
    runtime.admit(1, program({}))
    decode(runtime, 5, 1)
    runtime.release(1)
    runtime.admit(1, other)
    decode(runtime, 6, 1)
    assert len(plans_made) == 2


def test_a_dummy_pass_does_not_use_the_plan(plans_made: list[StepPlan]) -> None:
    runtime = new_runtime()
    runtime.admit(1, program({}))
    decode(runtime, 5, 1)
    runtime.idle()
    hidden, carried = stream(rows=ROWS)
    assert torch.equal(edited(runtime, hidden, carried), carried)
    decode(runtime, 6, 1)


def test_a_request_enters_its_span(plans_made: list[StepPlan]) -> None:
    """Before its span the request is routed to slot 0, and the batch has the same requests."""
    runtime = new_runtime()
    runtime.admit(1, program({}))
    runtime.admit(2, program({"scope": {"start": 7, "end": 9}}))
    for position in range(4, 12):
        decode(runtime, position, 1, 2)
    assert len(plans_made) == 3


def test_prefill_plans_are_not_reused(plans_made: list[StepPlan]) -> None:
    runtime = new_runtime()
    runtime.admit(1, program({}))
    for _ in range(2):
        run_step(runtime, (1, 0, 4))
    assert len(plans_made) == 2


def test_equal_numbers_of_rows_and_requests_are_not_mistaken_for_decoding() -> None:
    """As many rows as requests, but not one each: the second request's first row reaches its edit at 8."""
    runtime = new_runtime()
    runtime.admit(1, program({}))
    runtime.admit(2, STARTS_AND_ENDS)
    run_step(runtime, (1, 0, 0), (2, 7, 2))
    run_step(runtime, (1, 0, 0), (2, 8, 2))


def test_an_engine_that_captures_reuses_no_plan(plans_made: list[StepPlan]) -> None:
    runtime = new_runtime(capture_blocks=(0,))
    runtime.admit(1, program({"scope": "generation"}))
    for position in (5, 6):
        decode(runtime, position, 1)
        runtime.capture([0], [False])
    assert len(plans_made) == 2


GATE = {"gate": {"vector": "c", "min_cos": 0.0}}
RANK_2 = {"vector": "reft", "op": "low_rank", "blocks": [1, 3]}
FEATURE = {"vector": "jump", "op": "feature", "blocks": 2, "feature": [3, 7], "scale": -1.5}
ROTATION = {"op": "rotate", "toward": "c", "degrees": 90.0}
REVERSE = {"vector": "d", "op": "rotate", "toward": "a", "to_degrees": 30.0}
for _edit in (RANK_2, FEATURE, ROTATION, REVERSE):
    program(_edit)  # its rows are vectors from now on


@pytest.mark.parametrize("first", [GATE, RANK_2, FEATURE, ROTATION], ids=["gate", "rank", "feature", "rotation"])
def test_edits_that_need_the_whole_algebra_share_one_plan(plans_made: list[StepPlan], first: dict[str, Any]) -> None:
    runtime = new_runtime()
    runtime.admit(1, program(first, {"vector": "b", "scale": 0.5}))
    runtime.admit(2, program({"blocks": [0, 2, 3]}, preserve_norm=True))
    runtime.admit(3, program({"scope": {"start": 8}}))
    for position in range(5, 8):
        decode(runtime, position, 1, 2, 3)
    assert len(plans_made) == 1
    assert plans_made[0].full
    assert plans_made[0].full.keys().isdisjoint(plans_made[0].place_of)
    hidden, carried = stream(rows=ROWS)
    changed_LT = [(edited(runtime, hidden, carried, site) != carried).any(1)[:2].tolist() for site in range(4)]
    assert [first for first, _ in changed_LT][1:] == [True] * 3
    assert [second for _, second in changed_LT] == [True, False, True, True]
    decode(runtime, 8, 1, 2, 3)
    assert len(plans_made) == 2


def test_a_site_that_no_request_uses_costs_nothing(plans_made: list[StepPlan]) -> None:
    """Neither bank rows nor entries of it are read, whatever the numbers of armed blocks and entries are."""
    runtime = new_runtime()
    runtime.admit(1, program({"blocks": 2}))
    runtime.admit(2, program({"op": "ablate", "blocks": [2]}))
    decode(runtime, 5, 1, 2)
    assert list(plans_made[0].place_of) == [2]
    assert len(plans_made[0].steps_at_L) == 1


# When an entry applies

OPEN, CLOSE, OTHER = 5, 6, 1
WINDOW = {"after": OPEN, "until": CLOSE, "each": True}


@pytest.mark.parametrize("scope", [WINDOW, {"except": WINDOW}], ids=["inside", "outside"])
@pytest.mark.parametrize("op", ["add", "ablate"])
def test_a_plan_lasts_until_a_window_opens_or_closes(plans_made: list[StepPlan], op: str, scope: Any) -> None:
    runtime = new_runtime()
    runtime.admit(1, program({"vector": "b"}))
    runtime.admit(2, program({"op": op, "scope": scope}))
    made = []
    tokens = [OTHER, OPEN, OTHER, OTHER, CLOSE, OTHER, OPEN, CLOSE, OTHER, OPEN, OPEN, OTHER]
    for position, token in enumerate(tokens, start=5):
        decode(runtime, position, 1, 0, 2, tokens=[OPEN, CLOSE, token])
        made.append(len(plans_made))
    # The window begins after OPEN and ends before CLOSE. Another OPEN begins a new one.
    assert made == [1, 1, 2, 2, 3, 3, 3, 3, 3, 3, 4, 5]


def test_a_window_that_reaches_its_limit_makes_a_new_plan(plans_made: list[StepPlan]) -> None:
    runtime = new_runtime()
    runtime.admit(1, program({"scope": {"after": OPEN, "tokens": 2}}), tokens=[OTHER, OPEN])
    for position in range(2, 8):
        decode(runtime, position, 1, tokens=[OTHER])
    assert len(plans_made) == 2


SCHEDULES = [{"kind": "linear", "over": 4, "to": 0.25}, {"kind": "exponential", "over": 4, "to": 0.25}]


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: schedule["kind"])
@pytest.mark.parametrize("op", ["add", "ablate"])
def test_one_plan_follows_a_schedule_to_its_end(plans_made: list[StepPlan], op: str, schedule: Any) -> None:
    runtime = new_runtime()
    runtime.admit(1, program({"op": op, "scope": {"start": 7}, "schedule": schedule}))
    runtime.admit(2, program({}))
    made = []
    for position in range(5, 14):
        decode(runtime, position, 1, 2)
        made.append(len(plans_made))
    assert made == [1, 1, 2, 2, 2, 2, 3, 3, 3]


def test_a_schedule_starts_again_in_each_window(plans_made: list[StepPlan]) -> None:
    runtime = new_runtime()
    runtime.admit(1, program({"scope": {"after": OPEN, "each": True}, "schedule": SCHEDULES[0]}))
    made = []
    for position, token in enumerate([OPEN, *[OTHER] * 6, OPEN, *[OTHER] * 6]):
        decode(runtime, position, 1, tokens=[token])
        made.append(len(plans_made))
    assert made == [1, 2, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4, 5, 5]


@pytest.mark.parametrize("holds", [True, False])
@pytest.mark.parametrize("at", ["last_prompt_token", "mean_prompt", "max_prompt"])
def test_a_request_that_is_measured_uses_the_reference(plans_made: list[StepPlan], at: str, holds: bool) -> None:
    runtime = new_runtime()
    when = {"vector": "c", "measure": "cosine", "at": at, "above": -1.5 if holds else 1.5, "blocks": [0, 1]}
    runtime.admit(1, program({}, when=when, prompt_len=PROMPT_LEN))
    runtime.admit(2, program({"vector": "b"}))
    run_step(runtime, (1, 0, PROMPT_LEN - 1), (2, 5, 1))
    decode(runtime, PROMPT_LEN - 1, 1, 2)
    # Before its last token, a request that is measured only there has plans as any other.
    assert len(plans_made) == (at == "last_prompt_token")
    assert bool(runtime.tables.measured_SQ[1, 0] != 0)
    plans_made.clear()
    for position in range(PROMPT_LEN, 8):
        decode(runtime, position, 1, 2)
    assert len(plans_made) == 1
    hidden, carried = stream(rows=ROWS)
    changed_T = (edited(runtime, hidden, carried, 2) != carried).any(1)
    assert changed_T.tolist() == [holds, True, *[False] * 4]


def test_a_request_that_was_measured_before_is_not_measured_again(plans_made: list[StepPlan]) -> None:
    """After preemption its prompt is computed again, with the numbers from before."""
    runtime = new_runtime()
    when = {"vector": "c", "at": "mean_prompt", "above": 0.5, "blocks": 0}
    runtime.admit(1, program({}, when=when, prompt_len=PROMPT_LEN), measured=[40.0])
    run_step(runtime, (1, 0, PROMPT_LEN))
    decode(runtime, PROMPT_LEN, 1)
    assert len(plans_made) == 2
    assert runtime.tables.measured_SQ[1, 0] == 40.0


EDITS: list[dict[str, Any]] = [
    {},
    {"vector": "b", **GATE, "schedule": SCHEDULES[0]},
    {"scope": WINDOW, **RANK_2},
    {"schedule": SCHEDULES[1], **FEATURE},
    REVERSE,
    {"vector": "b", "op": "ablate", "scope": WINDOW},
    {"vector": "c", "scope": {"after": [OTHER, OTHER], "until": OPEN, "start": 3}, "schedule": SCHEDULES[1]},
    {"vector": "a", "op": "add_relative", "scope": "generation", "schedule": SCHEDULES[0]},
    {"vector": "b", "scope": {"except": WINDOW}, "scale": -2.0},
    {"vector": "d", "op": "set", "target": 1.5, "scope": {"after": CLOSE, "each": True, "tokens": 2}},
    {"op": "ablate", "when": {"vector": "c", "at": "mean_prompt", "above": 0.0, "blocks": 0}},
    {
        "when": {
            "any": [
                {"vector": "c", "above": 0.3, "blocks": 0},
                {"vector": "b", "below": 0.0, "at": "max_prompt", "blocks": 1},
            ]
        }
    },
]


@pytest.mark.parametrize("seed", range(8))
def test_random_steps_round_as_the_reference(plans_made: list[StepPlan], seed: int) -> None:
    """Requests with random edits are prefilled in chunks, decode and leave; tokens that open and close are frequent."""
    rng = np.random.default_rng(seed)
    runtime = new_runtime()
    at = {1: -1, 2: -1, 3: -1}
    for _ in range(60):
        for slot in at:
            if at[slot] < 0:
                chosen = rng.choice(len(EDITS), size=3, replace=False)
                norm = {"preserve_norm": True} if rng.random() < 0.2 else {}
                runtime.admit(slot, program(*(EDITS[i] for i in chosen), prompt_len=PROMPT_LEN, **norm))
                at[slot] = 0
        counts = {slot: min(2, PROMPT_LEN - at[slot]) if at[slot] < PROMPT_LEN else 1 for slot in at}
        tokens = rng.choice([OPEN, CLOSE, OTHER], size=sum(counts.values()), p=[0.1, 0.1, 0.8])
        run_step(runtime, *((slot, at[slot], counts[slot]) for slot in at), tokens=tokens.tolist())
        for slot in at:
            at[slot] += counts[slot]
            if at[slot] > PROMPT_LEN and rng.random() < 0.03:
                runtime.release(slot)
                at[slot] = -1
    assert 10 < len(plans_made) < 60
