"""Captured rows, over a real runtime: every requested position comes back, however it was computed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from helpers.random_specs import NUM_BLOCKS
from helpers.stepping import HIDDEN_SIZE, changed, edited, new_runtime, program, route, stream

from steer_engine.capture import CaptureRequest, Positions
from steer_engine.engine.outputs import CaptureBuffer
from steer_engine.engine.runtime import EngineRuntime

CAPTURE_BLOCKS = (1, 3)


@pytest.fixture
def runtime() -> EngineRuntime:
    return new_runtime(capture_blocks=CAPTURE_BLOCKS)


@pytest.fixture
def buffer(runtime: EngineRuntime) -> CaptureBuffer:
    return CaptureBuffer(runtime)


def value(request: int, position: int, block: int) -> float:
    return 1000.0 * request + 10.0 * position + block


def request(key: str, positions: Positions, **fields: Any) -> CaptureRequest:
    return CaptureRequest(key=key, positions=positions, **fields)


def plan(buffer: CaptureBuffer, batch: Sequence[tuple[str, int, int]]) -> None:
    """Plan a step of (request id, first position, rows)."""
    firsts_B = np.array([first for _, first, _ in batch], dtype=np.int64)
    counts_B = np.array([count for *_, count in batch], dtype=np.int64)
    buffer.plan([name for name, _, _ in batch], firsts_B, counts_B)


def step(
    runtime: EngineRuntime,
    buffer: CaptureBuffer,
    requests: Sequence[tuple[int, CaptureRequest | None, int, int]],
    *,
    offset: float = 0.0,
) -> None:
    """One step of (request, its capture, first position, rows): every row holds its request, position and block."""
    route(runtime, *((0, first, count) for _, _, first, count in requests))
    for number, capture, _, _ in requests:
        buffer.start(str(number), capture)
    plan(buffer, [(str(number), first, count) for number, _, first, count in requests])
    for block in range(NUM_BLOCKS):
        rows = [value(r, p, block) + offset for r, _, first, n in requests for p in range(first, first + n)]
        runtime.edit(None, torch.tensor(rows)[:, None].expand(-1, HIDDEN_SIZE).contiguous(), block)
    for number, *_ in requests:
        buffer.stop(str(number))
    buffer.collect()


def assert_taken(buffer: CaptureBuffer, key: str, request: int, positions: list[int], offset: float = 0.0) -> None:
    found, rows_LPD = buffer.take(key)
    assert found == positions
    assert rows_LPD.dtype == np.float32
    assert rows_LPD.shape == (len(CAPTURE_BLOCKS), len(positions), HIDDEN_SIZE)
    for place, block in enumerate(CAPTURE_BLOCKS):
        for i, position in enumerate(positions):
            assert (rows_LPD[place, i] == value(request, position, block) + offset).all()


def test_a_whole_prompt_in_one_step(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    step(runtime, buffer, [(1, request("k", range(5)), 0, 5)])
    assert_taken(buffer, "k", 1, [0, 1, 2, 3, 4])


def test_a_prompt_in_chunks(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    capture = request("k", range(2, 9))
    for first, count in ((0, 1), (1, 3), (4, 4), (8, 4), (12, 1)):
        step(runtime, buffer, [(1, capture, first, count)])
    assert_taken(buffer, "k", 1, list(range(2, 9)))


def test_the_last_token_only(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    capture = request("k", range(6, 7))
    step(runtime, buffer, [(1, capture, 0, 4)])
    step(runtime, buffer, [(1, capture, 4, 3)])
    step(runtime, buffer, [(1, capture, 7, 1)])
    assert_taken(buffer, "k", 1, [6])


def test_several_requests_among_others(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    one, other = request("one", range(1, 4)), request("other", range(100))
    step(runtime, buffer, [(7, None, 3, 2), (1, one, 0, 3), (8, None, 0, 1), (2, other, 5, 4)])
    step(runtime, buffer, [(2, other, 9, 1), (1, one, 3, 3)])
    assert_taken(buffer, "other", 2, [5, 6, 7, 8, 9])
    assert_taken(buffer, "one", 1, [1, 2, 3])


def test_chosen_positions_at_chosen_blocks(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    capture = request("k", (0, 3, 6), blocks=(3,))
    whole = request("whole", range(3))
    step(runtime, buffer, [(1, capture, 0, 4), (2, whole, 0, 3)])
    assert buffer.num_bytes == (2 * 1 + 3 * len(CAPTURE_BLOCKS)) * HIDDEN_SIZE * 4
    step(runtime, buffer, [(1, capture, 4, 3)])
    found, rows_LPD = buffer.take("k")
    assert found == [0, 3, 6]
    assert rows_LPD[:, :, 0].tolist() == [[value(1, position, 3) for position in found]]
    assert_taken(buffer, "whole", 2, [0, 1, 2])
    assert buffer.num_bytes == 0


def test_blocks_of_other_pipeline_stages_are_left_out(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    step(runtime, buffer, [(1, request("some", range(2), blocks=(0, 3)), 0, 2)])
    step(runtime, buffer, [(1, request("none", range(2), blocks=(0,)), 0, 2)])
    found, rows_LPD = buffer.take("some")
    assert found == [0, 1]
    assert rows_LPD[:, :, 0].tolist() == [[value(1, position, 3) for position in found]]
    found, rows_LPD = buffer.take("none")
    assert (found, rows_LPD.shape) == ([0, 1], (0, 2, HIDDEN_SIZE))


def test_before_and_after_the_edit_side_by_side(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    """Two requests with one program, captured before and after its edit; and an unsteered one."""
    edit = program({"vector": "a", "blocks": 1, "scale": 3.0}, prompt_len=2)
    for slot in (1, 2):
        runtime.admit(slot, edit)
    names = ("before", "after", "plain")
    for name in names:
        buffer.start(name, request(name, range(2), after=name != "before"))
    route(runtime, (1, 0, 2), (2, 0, 2), (0, 0, 2))
    plan(buffer, [(name, 0, 2) for name in names])
    hidden, carried = stream(rows=6)
    left = {block: edited(runtime, hidden, carried, block) for block in range(NUM_BLOCKS)}
    buffer.collect()
    assert changed(carried, left[1]) == [0, 1, 2, 3]
    for rows, key, source in (
        (slice(0, 2), "before", carried),
        (slice(2, 4), "after", left[1]),
        (slice(4, 6), "plain", carried),
    ):
        _, rows_LPD = buffer.take(key)
        assert np.array_equal(rows_LPD[0], (hidden + source)[rows].numpy())
        assert np.array_equal(rows_LPD[1], (hidden + carried)[rows].numpy())  # block 3: nothing is edited there


def test_positions_computed_again_are_overwritten(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    """After a preemption the prompt runs once more."""
    capture = request("k", range(4))
    step(runtime, buffer, [(1, capture, 0, 3)])
    step(runtime, buffer, [(1, capture, 0, 4)], offset=0.5)
    assert_taken(buffer, "k", 1, [0, 1, 2, 3], offset=0.5)


def test_rows_are_taken_once(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    step(runtime, buffer, [(1, request("k", range(2)), 0, 2)])
    assert_taken(buffer, "k", 1, [0, 1])
    assert_taken(buffer, "k", 1, [])


def test_nothing_is_captured_under_a_key_that_was_taken(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    """An aborted request may run one more step."""
    buffer.start("1", request("k", range(4)))
    for first, expected in ((0, [0, 1]), (2, [])):
        route(runtime, (0, first, 2))
        plan(buffer, [("1", first, 2)])
        for block in range(NUM_BLOCKS):
            runtime.edit(None, torch.full((2, HIDDEN_SIZE), 1.0), block)
        assert buffer.take("k")[0] == expected
    assert buffer.num_bytes == 0


def test_nothing_planned_is_nothing_captured(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    buffer.collect()
    plan(buffer, [])
    buffer.collect()
    step(runtime, buffer, [(1, None, 0, 3)])
    step(runtime, buffer, [(1, request("k", range(5, 9)), 0, 3)])
    assert_taken(buffer, "k", 1, [])
    assert_taken(buffer, "never", 1, [])


def test_a_step_without_captures_keeps_earlier_rows(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    step(runtime, buffer, [(1, request("k", range(2)), 0, 2)])
    step(runtime, buffer, [(2, None, 0, 6)], offset=9.0)
    buffer.collect()
    assert_taken(buffer, "k", 1, [0, 1])


def test_captured_rows_are_copies(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    """The device buffer is written again by the next step."""
    step(runtime, buffer, [(1, request("one", range(2)), 0, 2)])
    step(runtime, buffer, [(2, request("two", range(2)), 0, 2)])
    assert_taken(buffer, "one", 1, [0, 1])
    assert_taken(buffer, "two", 2, [0, 1])


def test_a_plan_must_agree_in_length(buffer: CaptureBuffer) -> None:
    buffer.start("1", request("k", range(2)))
    with pytest.raises(ValueError, match="zip"):
        buffer.plan(["1"], np.zeros(2, dtype=np.int64), np.ones(1, dtype=np.int64))
