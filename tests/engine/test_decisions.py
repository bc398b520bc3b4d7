"""What was measured is copied when a prompt is complete, and a request that has left meanwhile raises nothing."""

from __future__ import annotations

import numpy as np
from helpers.stepping import new_runtime, program

from steer_engine.engine.decisions import Decisions

MEASURING = program({"when": {"vector": "a", "blocks": [0], "above": 0.0}}, prompt_len=4)


def test_numbers_are_copied_when_the_prompt_is_complete() -> None:
    runtime = new_runtime()
    decisions = Decisions(runtime)
    decisions.start("x", 1, MEASURING)
    for first, count, complete in ((0, 2, False), (2, 2, True)):
        decisions.plan(["x"], np.array([first]), np.array([count]))
        runtime.tables.measured_SQ[1, 0] = 3.5
        decisions.copy()
        assert decisions.measured("x") == ([3.5] if complete else [])
    runtime.tables.measured_SQ[1, 0] = 9.0  # the slot's next owner
    assert decisions.measured("x") == [3.5]
    decisions.forget(["x"])
    assert decisions.measured("x") == []


def test_a_request_that_left_after_the_step_was_planned() -> None:
    decisions = Decisions(new_runtime())
    decisions.start("x", 1, MEASURING)
    decisions.start("y", 2, MEASURING)
    decisions.plan(["x", "y"], np.array([0, 0]), np.array([4, 4]))
    decisions.forget(["x"])
    decisions.copy()
    assert decisions.measured("x") == []
    assert decisions.measured("y") == [0.0]
