"""The reader, over a real runtime: what is asked comes back, position by position, however it was computed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from helpers.random_specs import NUM_BLOCKS
from helpers.stepping import HIDDEN_SIZE, changed, edited, new_runtime, program, route, stream

from steer_engine.engine.capture_buffer import Reader
from steer_engine.engine.runtime import EngineRuntime
from steer_engine.program import Capture

CAPTURE_BLOCKS = (1, 3)


@pytest.fixture
def runtime() -> EngineRuntime:
    return new_runtime(capture_blocks=CAPTURE_BLOCKS)


@pytest.fixture
def reader(runtime: EngineRuntime) -> Reader:
    return Reader(runtime)


def value(request: int, position: int, block: int) -> float:
    return 1000.0 * request + 10.0 * position + block


def step(
    runtime: EngineRuntime,
    reader: Reader,
    requests: Sequence[tuple[int, Capture | None, int, int]],
    *,
    offset: float = 0.0,
) -> None:
    """One step of (request, what it reads, first position, rows): every row holds its request, position and block."""
    route(runtime, *((0, first, count) for _, _, first, count in requests))
    reader.plan(
        [capture for _, capture, _, _ in requests], [first for *_, first, _ in requests], [n for *_, n in requests]
    )
    for block in range(NUM_BLOCKS):
        rows = [value(r, p, block) + offset for r, _, first, n in requests for p in range(first, first + n)]
        runtime.edit(None, torch.tensor(rows)[:, None].expand(-1, HIDDEN_SIZE).contiguous(), block)
    reader.collect()


def assert_taken(reader: Reader, key: str, request: int, positions: list[int], offset: float = 0.0) -> None:
    found, rows_LPD = reader.take(key)
    assert found == positions
    assert rows_LPD.dtype == np.float32
    assert rows_LPD.shape == (len(CAPTURE_BLOCKS), len(positions), HIDDEN_SIZE)
    for place, block in enumerate(CAPTURE_BLOCKS):
        for i, position in enumerate(positions):
            assert (rows_LPD[place, i] == value(request, position, block) + offset).all()


def test_a_whole_prompt_in_one_step(runtime: EngineRuntime, reader: Reader) -> None:
    step(runtime, reader, [(1, Capture(key="k", start=0, end=5), 0, 5)])
    assert_taken(reader, "k", 1, [0, 1, 2, 3, 4])


def test_a_prompt_in_chunks(runtime: EngineRuntime, reader: Reader) -> None:
    capture = Capture(key="k", start=2, end=9)
    for first, count in ((0, 1), (1, 3), (4, 4), (8, 4), (12, 1)):
        step(runtime, reader, [(1, capture, first, count)])
    assert_taken(reader, "k", 1, list(range(2, 9)))


def test_the_last_token_only(runtime: EngineRuntime, reader: Reader) -> None:
    capture = Capture(key="k", start=6, end=7)
    step(runtime, reader, [(1, capture, 0, 4)])
    step(runtime, reader, [(1, capture, 4, 3)])
    step(runtime, reader, [(1, capture, 7, 1)])
    assert_taken(reader, "k", 1, [6])


def test_several_requests_among_others(runtime: EngineRuntime, reader: Reader) -> None:
    one, other = Capture(key="one", start=1, end=4), Capture(key="other", start=0, end=100)
    step(runtime, reader, [(7, None, 3, 2), (1, one, 0, 3), (8, None, 0, 1), (2, other, 5, 4)])
    step(runtime, reader, [(2, other, 9, 1), (1, one, 3, 3)])
    assert_taken(reader, "other", 2, [5, 6, 7, 8, 9])
    assert_taken(reader, "one", 1, [1, 2, 3])


def test_chosen_positions_at_chosen_blocks(runtime: EngineRuntime, reader: Reader) -> None:
    capture = Capture(key="k", start=0, end=7, only=(0, 3, 6), blocks=(3,))
    whole = Capture(key="whole", start=0, end=3)
    step(runtime, reader, [(1, capture, 0, 4), (2, whole, 0, 3)])
    assert reader.num_bytes == (2 * 1 + 3 * len(CAPTURE_BLOCKS)) * HIDDEN_SIZE * 4
    step(runtime, reader, [(1, capture, 4, 3)])
    found, rows_LPD = reader.take("k")
    assert found == [0, 3, 6]
    assert rows_LPD[:, :, 0].tolist() == [[value(1, position, 3) for position in found]]
    assert_taken(reader, "whole", 2, [0, 1, 2])
    assert reader.num_bytes == 0


def test_blocks_of_other_stages_of_a_pipeline_are_passed_over(runtime: EngineRuntime, reader: Reader) -> None:
    step(runtime, reader, [(1, Capture(key="some", start=0, end=2, blocks=(0, 3)), 0, 2)])
    step(runtime, reader, [(1, Capture(key="none", start=0, end=2, blocks=(0,)), 0, 2)])
    found, rows_LPD = reader.take("some")
    assert found == [0, 1]
    assert rows_LPD[:, :, 0].tolist() == [[value(1, position, 3) for position in found]]
    found, rows_LPD = reader.take("none")
    assert (found, rows_LPD.shape) == ([0, 1], (0, 2, HIDDEN_SIZE))


def test_before_and_after_the_edit_side_by_side(runtime: EngineRuntime, reader: Reader) -> None:
    """Two requests with one program, of which one reads what the edit leaves; and one that nothing steers."""
    edit = program({"vector": "a", "blocks": 1, "scale": 3.0}, prompt_len=2)
    for slot in (1, 2):
        runtime.admit(slot, edit)
    captures = [Capture(key=key, start=0, end=2, after=key != "before") for key in ("before", "after", "plain")]
    route(runtime, (1, 0, 2), (2, 0, 2), (0, 0, 2))
    reader.plan(captures, [0, 0, 0], [2, 2, 2])
    hidden, carried = stream(rows=6)
    left = {block: edited(runtime, hidden, carried, block) for block in range(NUM_BLOCKS)}
    reader.collect()
    assert changed(carried, left[1]) == [0, 1, 2, 3]
    for rows, key, source in (
        (slice(0, 2), "before", carried),
        (slice(2, 4), "after", left[1]),
        (slice(4, 6), "plain", carried),
    ):
        _, rows_LPD = reader.take(key)
        assert np.array_equal(rows_LPD[0], (hidden + source)[rows].numpy())
        assert np.array_equal(rows_LPD[1], (hidden + carried)[rows].numpy())  # block 3: nothing is edited there


def test_positions_computed_again_are_overwritten(runtime: EngineRuntime, reader: Reader) -> None:
    """After a preemption the prompt runs once more."""
    capture = Capture(key="k", start=0, end=4)
    step(runtime, reader, [(1, capture, 0, 3)])
    step(runtime, reader, [(1, capture, 0, 4)], offset=0.5)
    assert_taken(reader, "k", 1, [0, 1, 2, 3], offset=0.5)


def test_taking_takes_away(runtime: EngineRuntime, reader: Reader) -> None:
    step(runtime, reader, [(1, Capture(key="k", start=0, end=2), 0, 2)])
    assert_taken(reader, "k", 1, [0, 1])
    assert_taken(reader, "k", 1, [])


def test_nothing_planned_is_nothing_read(runtime: EngineRuntime, reader: Reader) -> None:
    reader.collect()
    reader.plan((), (), ())
    reader.collect()
    step(runtime, reader, [(1, None, 0, 3)])
    step(runtime, reader, [(1, Capture(key="k", start=5, end=9), 0, 3)])
    assert_taken(reader, "k", 1, [])
    assert_taken(reader, "never", 1, [])


def test_a_step_without_readers_leaves_what_was_read(runtime: EngineRuntime, reader: Reader) -> None:
    step(runtime, reader, [(1, Capture(key="k", start=0, end=2), 0, 2)])
    step(runtime, reader, [(2, None, 0, 6)], offset=9.0)
    reader.collect()
    assert_taken(reader, "k", 1, [0, 1])


def test_what_is_kept_is_a_copy(runtime: EngineRuntime, reader: Reader) -> None:
    """The device buffer is written again by the next step."""
    step(runtime, reader, [(1, Capture(key="one", start=0, end=2), 0, 2)])
    step(runtime, reader, [(2, Capture(key="two", start=0, end=2), 0, 2)])
    assert_taken(reader, "one", 1, [0, 1])
    assert_taken(reader, "two", 2, [0, 1])


def test_plans_must_agree_in_length(reader: Reader) -> None:
    with pytest.raises(ValueError, match="zip"):
        reader.plan([None], [0, 0], [1])
