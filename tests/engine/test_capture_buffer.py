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
from steer_engine.engine.outputs import MAX_TAKEN, CaptureBuffer
from steer_engine.engine.runtime import EngineRuntime
from steer_engine.site import SITES_IN_BLOCKS, Site, points_at

CAPTURE_BLOCKS = (1, 3)


@pytest.fixture
def runtime() -> EngineRuntime:
    return new_runtime(capture_blocks=CAPTURE_BLOCKS)


@pytest.fixture
def buffer(runtime: EngineRuntime) -> CaptureBuffer:
    return CaptureBuffer(runtime)


def value(request: int, position: int, block: int) -> float:
    return 1000.0 * request + 10.0 * position + block


def request(key: str, positions: Positions, points: tuple[int, ...] = CAPTURE_BLOCKS, **fields: Any) -> CaptureRequest:
    return CaptureRequest(key=key, positions=positions, points=points, **fields)


def plan(buffer: CaptureBuffer, batch: Sequence[tuple[str, int, int]], ahead: int = 0) -> torch.Tensor:
    """Plan a step of (request id, first position, rows). ahead: how much higher the host believes the positions to be.

    Returns the positions of the rows, as the runner has them on the device.
    """
    firsts_B = np.array([first + ahead for _, first, _ in batch], dtype=np.int64)
    counts_B = np.array([count for *_, count in batch], dtype=np.int64)
    positions_T = torch.tensor([first + i for _, first, count in batch for i in range(count)], dtype=torch.int64)
    buffer.plan([name for name, _, _ in batch], firsts_B, counts_B, positions_T)
    return positions_T


def step(
    runtime: EngineRuntime,
    buffer: CaptureBuffer,
    requests: Sequence[tuple[int, CaptureRequest | None, int, int]],
    *,
    offset: float = 0.0,
    ahead: int = 0,
) -> None:
    """One step of (request, its capture, first position, rows): every row holds its request, position and block.

    ahead: see `plan`.
    """
    route(runtime, *((0, first, count) for _, _, first, count in requests))
    for number, capture, _, _ in requests:
        buffer.start(str(number), capture)
    positions_T = plan(buffer, [(str(number), first, count) for number, _, first, count in requests], ahead)
    for block in range(NUM_BLOCKS):
        rows = [value(r, p, block) + offset for r, _, first, n in requests for p in range(first, first + n)]
        runtime.edit(None, torch.tensor(rows)[:, None].expand(-1, HIDDEN_SIZE).contiguous(), block)
    for number, *_ in requests:
        buffer.stop(str(number))
    positions_T.fill_(-1)  # the runner uses its buffer for the next step
    buffer.collect()


def assert_taken(
    buffer: CaptureBuffer, key: str, request: int, positions: list[int], offset: float = 0.0, end: int | None = None
) -> None:
    points, found, rows_LPD = buffer.take(key, end)
    assert points == CAPTURE_BLOCKS
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
    capture = request("k", (0, 3, 6), points=(3,))
    whole = request("whole", range(3))
    step(runtime, buffer, [(1, capture, 0, 4), (2, whole, 0, 3)])
    assert buffer.num_bytes == (2 * 1 + 3 * len(CAPTURE_BLOCKS)) * HIDDEN_SIZE * 4
    step(runtime, buffer, [(1, capture, 4, 3)])
    _, found, rows_LPD = buffer.take("k")
    assert found == [0, 3, 6]
    assert rows_LPD[:, :, 0].tolist() == [[value(1, position, 3) for position in found]]
    assert_taken(buffer, "whole", 2, [0, 1, 2])
    assert buffer.num_bytes == 0


def test_blocks_of_other_pipeline_stages_are_left_out(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    step(runtime, buffer, [(1, request("some", range(2), points=(0, 3)), 0, 2)])
    step(runtime, buffer, [(1, request("none", range(2), points=(0,)), 0, 2)])
    points, found, rows_LPD = buffer.take("some")
    assert points == (3,)
    assert found == [0, 1]
    assert rows_LPD[:, :, 0].tolist() == [[value(1, position, 3) for position in found]]
    points, found, rows_LPD = buffer.take("none")
    assert (points, found, rows_LPD.shape) == ((), [0, 1], (0, 2, HIDDEN_SIZE))


def test_requests_at_several_sites_of_one_step() -> None:
    """Each gets the rows of its own points; only capture blocks have rows, at every armed site."""
    runtime = new_runtime(capture_blocks=CAPTURE_BLOCKS, sites=SITES_IN_BLOCKS)
    rows_MCD = runtime.tables.captured_MCD
    assert rows_MCD is not None
    assert len(rows_MCD) == 3 * len(CAPTURE_BLOCKS)
    buffer = CaptureBuffer(runtime)
    wanted = {
        "stream": CAPTURE_BLOCKS,
        "mlp": points_at((3,), Site.MLP),
        "both": (1, *points_at(CAPTURE_BLOCKS, Site.ATTN)),
        "plain": (),
    }
    for name, points in wanted.items():
        buffer.start(name, request(name, range(2), points) if points else None)
    route(runtime, *[(0, 0, 2)] * len(wanted))
    plan(buffer, [(name, 0, 2) for name in wanted])
    rows = torch.arange(2.0 * len(wanted))[:, None].expand(-1, HIDDEN_SIZE)
    for number, point in enumerate(runtime.points):
        runtime.edit(None, (rows + 10 * point).contiguous(), number)
    buffer.collect()
    for first, (name, points) in enumerate(wanted.items()):
        if points:
            found, positions, rows_LPD = buffer.take(name)
            assert (found, positions) == (points, [0, 1])
            expected = [[2 * first + 10 * point, 2 * first + 1 + 10 * point] for point in points]
            assert rows_LPD[:, :, 0].tolist() == expected
    assert buffer.num_bytes == 0


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
        rows_LPD = buffer.take(key).rows_LPD
        assert np.array_equal(rows_LPD[0], (hidden + source)[rows].numpy())
        assert np.array_equal(rows_LPD[1], (hidden + carried)[rows].numpy())  # block 3: nothing is edited there


def test_positions_computed_again_are_overwritten(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    """After a preemption the prompt runs once more."""
    capture = request("k", range(4))
    step(runtime, buffer, [(1, capture, 0, 3)])
    step(runtime, buffer, [(1, capture, 0, 4)], offset=0.5)
    assert_taken(buffer, "k", 1, [0, 1, 2, 3], offset=0.5)


def answer(key: str, prompt_len: int, max_tokens: int) -> CaptureRequest:
    return request(key, "all", scope="generation").at(prompt_len, max_tokens)


def test_an_answer_in_steps(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    """From the last token of the prompt, which chooses the first token, one row for each token."""
    capture = answer("k", prompt_len=6, max_tokens=4)
    step(runtime, buffer, [(1, capture, 0, 4)])
    for first, count in ((4, 2), (6, 1), (7, 1), (8, 1)):
        step(runtime, buffer, [(2, None, first, 1), (1, capture, first, count)])
    assert_taken(buffer, "k", 1, [5, 6, 7, 8], end=9)


def test_what_follows_the_end_of_an_answer_is_dropped(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    """A stop string is found after the engine has gone on, and a step may be under way."""
    capture = answer("k", prompt_len=2, max_tokens=9)
    step(runtime, buffer, [(1, capture, 0, 2)])
    for first in (2, 3, 4):
        step(runtime, buffer, [(1, capture, first, 1)])
    assert_taken(buffer, "k", 1, [1, 2], end=3)
    assert buffer.num_bytes == 0


def test_rejected_drafts_give_way_to_the_tokens_that_came(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    """The rows of a step hold where the device puts them, also where the host believes that all drafts were taken."""
    capture = answer("k", prompt_len=3, max_tokens=7)
    step(runtime, buffer, [(1, capture, 0, 3)])
    step(runtime, buffer, [(1, capture, 3, 4)], offset=0.5)  # one draft of three is taken: positions 3 and 4 stay
    step(runtime, buffer, [(2, None, 9, 2), (1, capture, 5, 4)], ahead=2)  # all are taken
    step(runtime, buffer, [(1, capture, 9, 4)], ahead=2)
    _, found, rows_LPD = buffer.take("k")
    assert found == [2, 3, 4, 5, 6, 7, 8], "no row beyond the longest answer is kept"
    expected = [value(1, position, 3) + 0.5 * (position in (3, 4)) for position in found]
    assert rows_LPD[1, :, 0].tolist() == expected


def test_an_answer_computed_again_is_overwritten(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    """After a preemption, the prompt and what there was of the answer run as one prompt, from a cached part on."""
    capture = answer("k", prompt_len=3, max_tokens=7)
    for first, count in ((0, 3), (3, 1), (4, 1), (5, 1)):
        step(runtime, buffer, [(1, capture, first, count)])
    step(runtime, buffer, [(1, capture, 4, 3)], offset=0.5)
    _, found, rows_LPD = buffer.take("k", 6)
    assert found == [2, 3, 4, 5]
    assert rows_LPD[0, :, 0].tolist() == [value(1, position, 1) + 0.5 * (position > 3) for position in found]


def test_a_request_that_returns_after_its_rows_were_taken(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    """Preempted while its stop string was found: it may enter the batch once more before it is aborted."""
    capture = answer("k", prompt_len=3, max_tokens=7)
    step(runtime, buffer, [(1, capture, 0, 3)])
    assert_taken(buffer, "k", 1, [2])
    step(runtime, buffer, [(1, capture, 0, 4)])
    assert buffer.num_bytes == 0
    assert_taken(buffer, "k", 1, [])


def test_keys_that_were_taken_are_not_remembered_for_ever(runtime: EngineRuntime, buffer: CaptureBuffer) -> None:
    for number in range(MAX_TAKEN + 1):
        buffer.take(f"k{number}")
    assert len(buffer._taken) == MAX_TAKEN
    step(runtime, buffer, [(1, request("k1", range(1)), 0, 1)])
    assert_taken(buffer, "k1", 1, [])


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
        assert buffer.take("k").positions == expected
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
        buffer.plan(["1"], np.zeros(2, dtype=np.int64), np.ones(1, dtype=np.int64), torch.zeros(1, dtype=torch.int64))
