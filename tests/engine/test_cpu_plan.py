"""A plan is kept exactly as long as it is right. That it rounds as the reference does: `test_engine_runtime`."""

from __future__ import annotations

from collections.abc import Callable

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
def made(monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """Every plan that is worked out."""
    plans: list[StepPlan] = []
    of_step = StepPlan.of_step
    monkeypatch.setattr(StepPlan, "of_step", lambda *args: plans.append(of_step(*args)) or plans[-1])
    return plans


def routed(runtime: EngineRuntime, *requests: tuple[int, int, int]) -> None:
    """A step of these requests, compared at every site with the reference on tables that are routed anew."""
    route(runtime, *requests)
    hidden, carried = stream(rows=ROWS)
    got = [edited(runtime, hidden, carried, site) for site in range(len(runtime.armed_blocks))]
    query_start_loc_B1, idx_mapping_B, positions_T, num_tokens = batch(*requests)
    route_rows_reference(query_start_loc_B1, idx_mapping_B, positions_T, runtime.tables, num_tokens)
    for site, after in enumerate(got):
        expected = carried.clone()
        edit_residual_reference(hidden, expected, runtime.tables, site, adds_only=False)
        assert torch.equal(after, expected)


def decode(runtime: EngineRuntime, position: int, *slots: int) -> None:
    """A step in which each slot has one row."""
    routed(runtime, *((slot, position, 1) for slot in slots))


def test_a_decoding_batch_is_planned_once(made: list[StepPlan]) -> None:
    runtime = new_runtime()
    runtime.admit(1, program({}))
    runtime.admit(2, program({"op": "ablate", "scope": "generation"}, prompt_len=PROMPT_LEN))
    for position in range(PROMPT_LEN, 12):
        decode(runtime, position, 1, 0, 2)
    assert len(made) == 1


CHANGES: list[tuple[str, Callable[[EngineRuntime], None]]] = [
    ("another request in the row", lambda runtime: decode(runtime, 5, 2, 1)),
    ("one request less", lambda runtime: decode(runtime, 5, 1)),
    ("an unsteered request more", lambda runtime: decode(runtime, 5, 1, 2, 0)),
    ("an edit begins", lambda runtime: decode(runtime, 8, 1, 2)),
    ("an edit has not begun", lambda runtime: decode(runtime, 2, 1, 2)),
    ("an edit ends", lambda runtime: decode(runtime, 20, 1, 2)),
    ("a request has no row and another two", lambda runtime: routed(runtime, (1, 5, 0), (2, 5, 2))),
    ("a request more, without a row", lambda runtime: routed(runtime, (1, 5, 1), (2, 5, 1), (0, 5, 0))),
    ("prompts are read again", lambda runtime: routed(runtime, (1, 5, 2), (2, 5, 1))),
]

STARTS_AND_ENDS = program({}, {"vector": "b", "scope": {"start": 3, "end": 20}}, {"vector": "c", "scope": {"start": 8}})


@pytest.mark.parametrize("change", [change for _, change in CHANGES], ids=[name for name, _ in CHANGES])
def test_a_change_makes_a_new_plan(made: list[StepPlan], change: Callable[[EngineRuntime], None]) -> None:
    runtime = new_runtime()
    runtime.admit(1, STARTS_AND_ENDS)
    runtime.admit(2, program({"op": "ablate"}))
    decode(runtime, 5, 1, 2)
    decode(runtime, 6, 1, 2)
    assert len(made) == 1
    change(runtime)
    assert len(made) == 2


@pytest.mark.parametrize("other", [program({"scale": -2.0}), program({"op": "ablate"}), program({"vector": "b"})])
def test_another_program_in_the_same_slot_makes_a_new_plan(made: list[StepPlan], other: Program) -> None:
    """What a slot's number says is not whose it is."""
    runtime = new_runtime()
    runtime.admit(1, program({}))
    decode(runtime, 5, 1)
    runtime.release(1)
    runtime.admit(1, other)
    decode(runtime, 6, 1)
    assert len(made) == 2


def test_a_dummy_pass_between_does_not_leave_a_plan(made: list[StepPlan]) -> None:
    runtime = new_runtime()
    runtime.admit(1, program({}))
    decode(runtime, 5, 1)
    runtime.idle()
    hidden, carried = stream(rows=ROWS)
    assert torch.equal(edited(runtime, hidden, carried), carried)
    decode(runtime, 6, 1)


def test_a_request_enters_its_span(made: list[StepPlan]) -> None:
    """Before, its row is routed to nobody, and the batch looks the same."""
    runtime = new_runtime()
    runtime.admit(1, program({}))
    runtime.admit(2, program({"scope": {"start": 7, "end": 9}}))
    for position in range(4, 12):
        decode(runtime, position, 1, 2)
    assert len(made) == 3


def test_no_plan_is_kept_of_prompts(made: list[StepPlan]) -> None:
    runtime = new_runtime()
    runtime.admit(1, program({}))
    for _ in range(2):
        routed(runtime, (1, 0, 4))
    assert len(made) == 2


def test_rows_are_not_taken_for_requests() -> None:
    """As many rows as requests, but not one each: the second request's first row reaches its edit at 8."""
    runtime = new_runtime()
    runtime.admit(1, program({}))
    runtime.admit(2, STARTS_AND_ENDS)
    routed(runtime, (1, 0, 0), (2, 7, 2))
    routed(runtime, (1, 0, 0), (2, 8, 2))


def test_an_engine_that_reads_keeps_no_plan(made: list[StepPlan]) -> None:
    runtime = new_runtime(capture_blocks=(0,))
    runtime.admit(1, program({"scope": "generation"}))
    for position in (5, 6):
        decode(runtime, position, 1)
        runtime.capture([0], [False])
    assert len(made) == 2


def test_gates_and_kept_norms_are_not_planned(made: list[StepPlan]) -> None:
    runtime = new_runtime()
    runtime.admit(1, program({"gate": {"vector": "c", "min_cos": 0.0}}))
    runtime.admit(2, program({}, preserve_norm=True))
    runtime.admit(3, program({}))
    decode(runtime, 5, 1, 3)
    decode(runtime, 5, 2, 3)
    assert not made
    decode(runtime, 5, 3)
    assert len(made) == 1
