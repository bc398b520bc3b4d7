"""While a schedule runs, one plan follows it, and rounds as the reference does at every position.

Each test runs with bank rows gathered for all sites and without.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers.stepping import batch, edited, new_runtime, program, route, stream
from steer_kernels import cpu_plan
from steer_kernels import tables as tb
from steer_kernels.cpu_plan import StepPlan
from steer_kernels.reference import edit_residual_reference, route_rows_reference
from steer_kernels.shares import shares_of
from steer_kernels.tables import Entry, Tables, encode_entry

from steer_engine.engine.runtime import EngineRuntime

OPEN, CLOSE, OTHER = 5, 6, 1
PROMPT_LEN = 4
ROWS = 6
WINDOW = {"after": OPEN, "until": CLOSE, "each": True}
LINEAR = {"kind": "linear", "over": 6, "to": 0.0}
EXPONENTIAL = {"kind": "exponential", "over": 9, "to": 0.01}
GROWING = {"kind": "linear", "over": 5, "to": 3.0}


@pytest.fixture(params=[True, False], ids=["gathered", "looked up"])
def made(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """All plans computed so far."""
    if not request.param:
        monkeypatch.setattr(cpu_plan, "MAX_GATHERED_NUMBERS", 0)
    plans: list[StepPlan] = []
    of_step = StepPlan.of_step
    monkeypatch.setattr(StepPlan, "of_step", lambda *args: plans.append(of_step(*args)) or plans[-1])
    return plans


def run_step(
    runtime: EngineRuntime, *requests: tuple[int, int], tokens: Sequence[int] = (), broken: Sequence[int] = ()
) -> None:
    """A decoding step of these (slot, position); every site is compared with the reference. broken: rows with inf."""
    rows = [(slot, position, 1) for slot, position in requests]
    route(runtime, *rows, tokens=tokens)
    hidden, carried = stream(rows=ROWS)
    carried[list(broken)] = torch.inf
    actual = [edited(runtime, hidden, carried, site) for site in range(len(runtime.armed_blocks))]
    query_start_loc_B1, idx_mapping_B, positions_T, _, num_tokens = batch(*rows)
    route_rows_reference(query_start_loc_B1, idx_mapping_B, positions_T, runtime.tables, num_tokens)
    for site, after in enumerate(actual):
        expected = carried.clone()
        edit_residual_reference(hidden, expected, runtime.tables, site, adds_only=False)
        torch.testing.assert_close(after, expected, rtol=0, atol=0, equal_nan=True)


def start_at(slot_words: torch.Tensor) -> torch.Tensor:
    return slot_words[..., tb.START] & tb.MAX_POSITION


@pytest.mark.parametrize("schedule", [LINEAR, EXPONENTIAL, GROWING], ids=["linear", "exponential", "growing"])
@pytest.mark.parametrize("op", ["add", "add_relative", "ablate"])
def test_requests_at_different_places_of_their_schedules_share_one_plan(
    made: list[StepPlan], op: str, schedule: Any
) -> None:
    runtime = new_runtime()
    runtime.admit(1, program({"op": op, "schedule": schedule, "scope": {"start": 4}}))
    runtime.admit(2, program({"vector": "b", "schedule": {**schedule, "over": 20}, "scope": {"start": 2}}, {"op": op}))
    runtime.admit(3, program({"vector": "c"}))
    changes = []
    for position in range(5, 30):
        run_step(runtime, (1, position), (0, 3), (2, position - 2), (3, position + 7))
        changes.append(len(made))
    # The second schedule ends at position 22 of its request, long after the first.
    assert changes == [1] * 19 + [2] * 6


def test_edits_with_different_schedules_at_different_blocks(made: list[StepPlan]) -> None:
    runtime = new_runtime()
    edits = [
        {"vector": "a", "blocks": [0, 1], "schedule": LINEAR},
        {"vector": "c", "blocks": [1, 2, 3], "schedule": EXPONENTIAL},
        {"vector": "b", "blocks": [1, 2], "schedule": GROWING, "op": "add_relative"},
        {"vector": "c", "blocks": [0, 3], "schedule": LINEAR},
        {"vector": "d"},
    ]
    runtime.admit(1, program(*edits))
    runtime.admit(2, program(*edits[::-1]))
    later = {"vector": "c", "blocks": [3], "schedule": LINEAR, "scope": {"start": 2}}
    runtime.admit(3, program({"blocks": [0], "schedule": LINEAR}, later))
    for position in range(2, 14):
        run_step(runtime, (1, position), (2, position), (3, position))
    assert len(made) == 2


def test_a_window_that_opens_or_closes_makes_a_new_plan(made: list[StepPlan]) -> None:
    runtime = new_runtime()
    runtime.admit(1, program({"scope": WINDOW, "schedule": LINEAR}))
    runtime.admit(2, program({"op": "ablate", "scope": {"except": WINDOW}, "schedule": EXPONENTIAL}))
    changes = []
    tokens = [OTHER, OPEN, *[OTHER] * 3, CLOSE, OTHER, OPEN, *[OTHER] * 8]
    for position, token in enumerate(tokens, start=PROMPT_LEN):
        run_step(runtime, (1, position), (0, 9), (2, position), tokens=[token, OTHER, OTHER])
        changes.append(len(made))
    # Windows begin at 6 and 12, the first ends before 9. Schedules end at 9 (the second request's) and at 18.
    assert changes == [1, 1, 2, 2, 2, 3, 3, 3, 4, 4, 4, 4, 4, 4, 5, 5]


@pytest.mark.parametrize("holds", [True, False])
def test_a_schedule_without_effect_makes_no_plans(made: list[StepPlan], holds: bool) -> None:
    """A condition that does not hold: the plan is that of an edit that never applies."""
    runtime = new_runtime()
    when = {"vector": "c", "at": "last_prompt_token", "above": -9.0 if holds else 9.0, "blocks": 0}
    runtime.admit(1, program({"schedule": LINEAR, "blocks": [1, 2]}, when=when, prompt_len=PROMPT_LEN))
    run_step(runtime, (1, PROMPT_LEN - 1))
    for position in (4, 5, 6, 7, 8):
        run_step(runtime, (1, position))
    assert len(made) == (2 if holds else 1)
    assert [plan.fading is None for plan in made] == ([False, True] if holds else [True])


def test_requests_leave_and_arrive(made: list[StepPlan]) -> None:
    runtime = new_runtime()
    runtime.admit(1, program({"schedule": EXPONENTIAL}))
    runtime.admit(2, program({"vector": "b", "schedule": LINEAR}))
    run_step(runtime, (1, 1), (2, 1))
    run_step(runtime, (1, 2), (2, 2))
    run_step(runtime, (2, 3))
    run_step(runtime, (2, 4), (1, 3))
    assert len(made) == 3
    runtime.release(2)
    runtime.admit(2, program({"vector": "c", "schedule": GROWING}))
    run_step(runtime, (2, 1), (1, 4))
    run_step(runtime, (2, 2), (1, 5))
    assert len(made) == 4


def test_positions_may_jump(made: list[StepPlan]) -> None:
    """Forward, back while a schedule runs, past its end, and back to before its end."""
    runtime = new_runtime()
    runtime.admit(1, program({"schedule": LINEAR, "scope": {"start": 4}}))
    runtime.admit(2, program({"vector": "b", "schedule": EXPONENTIAL, "op": "ablate"}))
    changes = []
    for first, second in [(5, 2), (8, 3), (4, 8), (12, 4), (6, 30), (12, 12), (7, 12), (30, 30), (30, 8)]:
        run_step(runtime, (1, first), (2, second))
        changes.append(len(made))
    # At (12, 12) both have ended; one plan later is for (7, 12), where the first runs.
    assert changes == [1, 1, 1, 1, 1, 2, 3, 4, 5]


def test_a_share_that_passes_zero(made: list[StepPlan]) -> None:
    """At 0 an edit does not apply, even to a row that is not finite; after it the same plan applies it again."""
    runtime = new_runtime()
    for slot, op in [(1, "add"), (2, "ablate")]:
        runtime.admit(slot, program({"op": op, "vector": "c", "schedule": {"kind": "linear", "over": 6, "to": 0.5}}))
        words_LEW = runtime.tables.entries_SLEW[slot]
        changed = Entry(row=0, over=4, slope=-0.5, to=-1.0, start=int(start_at(words_LEW[0, 0])))
        words_LEW[:, 0, tb.OVER :] = torch.from_numpy(encode_entry(changed))[tb.OVER :]
    for position in (1, 2, 3):
        run_step(runtime, (1, position), (2, position), broken=[1])
    assert len(made) == 1
    # A plan that is made where the share is 0, of one request alone.
    for position in (2, 3):
        run_step(runtime, (2, position))
    assert len(made) == 2


@pytest.mark.parametrize("seed", range(4))
def test_random_decoding(made: list[StepPlan], seed: int) -> None:
    rng = np.random.default_rng(seed)
    edits: list[dict[str, Any]] = [
        {"vector": "a", "schedule": LINEAR},
        {"vector": "b", "scope": WINDOW, "schedule": EXPONENTIAL, "op": "ablate"},
        {"vector": "c", "scope": {"except": WINDOW}, "schedule": GROWING},
        {"vector": "d", "scope": {"after": CLOSE, "each": True, "tokens": 4}, "schedule": LINEAR, "op": "add_relative"},
        {"vector": "a", "scope": {"start": 9, "end": 30}, "schedule": EXPONENTIAL},
        {"vector": "b"},
    ]
    runtime, at = new_runtime(), {1: 0, 2: 0, 3: 0}
    steps = 80
    for _ in range(steps):
        for slot, position in at.items():
            if position == 0:
                chosen = rng.choice(len(edits), size=int(rng.integers(1, 4)), replace=False)
                runtime.admit(slot, program(*(edits[i] for i in chosen)))
        run_step(runtime, *at.items(), tokens=rng.choice([OPEN, CLOSE, OTHER], size=3, p=[0.05, 0.05, 0.9]).tolist())
        for slot in at:
            at[slot] += 1
            if rng.random() < 0.03:
                runtime.release(slot)
                at[slot] = 0
    assert len(made) < steps * 0.7
    assert any(plan.fading is not None for plan in made)


@pytest.mark.parametrize("exponential", [False, True], ids=["linear", "exponential"])
def test_a_share_does_not_depend_on_the_place_in_the_batch(exponential: bool) -> None:
    """Vectorized code may round the last elements of a tensor differently."""
    num_rows = 501
    tables = Tables.allocate(
        num_slots=2, num_sites=1, num_entries=1, num_rows=1, hidden_size=1, max_tokens=8, bank_dtype=torch.float32
    )
    entry = Entry(row=0, over=5000, slope=-0.00123, to=0.5, exponential=exponential)
    words_NEW = torch.from_numpy(encode_entry(entry)).view(1, 1, -1).repeat(num_rows, 1, 1)
    pos_N, slot_N = torch.arange(num_rows, dtype=torch.int32), torch.ones(num_rows, dtype=torch.int64)
    windows_NJ = torch.full((num_rows, tb.MAX_TRIGGERS), tb.MAX_POSITION, dtype=torch.int32)

    def shares(first: int, count: int) -> torch.Tensor:
        rows = slice(first, first + count)
        return shares_of(words_NEW[rows], pos_N[rows], windows_NJ[rows], slot_N[rows], tables)

    whole = shares(0, num_rows)
    assert len(whole.unique()) > num_rows / 2
    for count in (1, 2, 7, 16, 33):
        parts = torch.cat([shares(first, count) for first in range(0, num_rows, count)])
        assert torch.equal(parts, whole)
