"""A plan is reused exactly while it is valid. `test_engine_runtime` checks that it rounds as the reference does."""

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
def plans_made(monkeypatch: pytest.MonkeyPatch) -> list[StepPlan]:
    """All plans computed so far."""
    plans: list[StepPlan] = []
    of_step = StepPlan.of_step
    monkeypatch.setattr(StepPlan, "of_step", lambda *args: plans.append(of_step(*args)) or plans[-1])
    return plans


def run_step(runtime: EngineRuntime, *requests: tuple[int, int, int]) -> None:
    """Run a step of these (slot, position, rows) and compare every site with the reference on freshly routed tables."""
    route(runtime, *requests)
    hidden, carried = stream(rows=ROWS)
    actual = [edited(runtime, hidden, carried, site) for site in range(len(runtime.armed_blocks))]
    query_start_loc_B1, idx_mapping_B, positions_T, _, num_tokens = batch(*requests)
    route_rows_reference(query_start_loc_B1, idx_mapping_B, positions_T, runtime.tables, num_tokens)
    for site, after in enumerate(actual):
        expected = carried.clone()
        edit_residual_reference(hidden, expected, runtime.tables, site, adds_only=False)
        assert torch.equal(after, expected)


def decode(runtime: EngineRuntime, position: int, *slots: int) -> None:
    """A step in which each slot has one row."""
    run_step(runtime, *((slot, position, 1) for slot in slots))


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


def test_gates_and_preserved_norms_use_the_reference(plans_made: list[StepPlan]) -> None:
    runtime = new_runtime()
    runtime.admit(1, program({"gate": {"vector": "c", "min_cos": 0.0}}))
    runtime.admit(2, program({}, preserve_norm=True))
    runtime.admit(3, program({}))
    decode(runtime, 5, 1, 3)
    decode(runtime, 5, 2, 3)
    assert not plans_made
    decode(runtime, 5, 3)
    assert len(plans_made) == 1
