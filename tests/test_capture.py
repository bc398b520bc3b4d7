"""Which positions of a prompt a capture request names, and captured rows in the requested order."""

from __future__ import annotations

import json

import numpy as np
import pytest

from steer_engine.capture import CaptureRequest, Positions
from steer_engine.errors import SteeringRequestError

PROMPT_LEN = 6


def requested(positions: Positions, max_rows: int | None = None) -> CaptureRequest:
    return CaptureRequest(key="k", positions=positions, blocks=(1, 3), after=True, max_rows=max_rows)


@pytest.mark.parametrize(
    ("positions", "expected"),
    [
        ("last", range(5, 6)),
        ("all", range(6)),
        ("mean", range(6)),
        ((-1,), (5,)),
        ((0,), (0,)),
        ((3, -4, 4, 3), (2, 3, 4)),
        ((-1, 0, 2, -6), (0, 2, 5)),
    ],
)
def test_absolute_positions(positions: Positions, expected: range | tuple[int, ...]) -> None:
    placed = requested(positions).at(PROMPT_LEN)
    assert placed == CaptureRequest(key="k", positions=expected, blocks=(1, 3), after=True)
    assert type(placed.positions) is type(expected), "a long range stays two numbers"


@pytest.mark.parametrize("number", [6, -7, 100])
def test_a_position_outside_the_prompt(number: int) -> None:
    with pytest.raises(SteeringRequestError, match=f"position {number} is outside .* which has 6 tokens") as caught:
        requested((0, number)).at(PROMPT_LEN)
    assert caught.value.param == "steering.capture.positions"


@pytest.mark.parametrize(("positions", "rows"), [("all", 6), ("mean", 6), ("last", 1), ((0, 0, 0), 3)])
def test_the_limit_counts_captured_and_returned_rows(positions: Positions, rows: int) -> None:
    assert requested(positions, max_rows=rows).at(PROMPT_LEN).max_rows is None
    with pytest.raises(SteeringRequestError, match=f"{rows} token rows .* limit of {rows - 1} ") as caught:
        requested(positions, max_rows=rows - 1).at(PROMPT_LEN)
    assert caught.value.param == "steering.capture.positions"


def captured(positions: Positions) -> np.ndarray:
    """What the workers would return, float32 [2, P, 1]: position p of block b is 10 b + p."""
    placed = requested(positions).at(PROMPT_LEN)
    found = np.array(placed.within(0, PROMPT_LEN), dtype=np.float32)
    return (found + np.array([[10], [30]], dtype=np.float32))[:, :, None]


@pytest.mark.parametrize(
    ("positions", "expected"), [("last", [5]), ("all", [0, 1, 2, 3, 4, 5]), ((-1, 0, -1), [5, 0, 5]), ((2,), [2])]
)
def test_rows_come_in_the_requested_order(positions: Positions, expected: list[int]) -> None:
    found, rows_LPD = requested(positions).arranged(captured(positions), PROMPT_LEN)
    assert found == expected
    assert rows_LPD[0, :, 0].tolist() == [10 + position for position in expected]
    assert rows_LPD[1, :, 0].tolist() == [30 + position for position in expected]


def test_a_mean_is_one_row_in_float32() -> None:
    found, rows_LPD = requested("mean").arranged(captured("mean"), PROMPT_LEN)
    assert found == list(range(6))
    assert rows_LPD.tolist() == [[[12.5]], [[32.5]]]
    assert rows_LPD.dtype == np.float32


def test_missing_rows_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="6 token rows were expected, 5 were captured"):
        requested("all").arranged(captured("all")[:, :5], PROMPT_LEN)


def test_positions_within_a_chunk() -> None:
    chosen = requested((2, 5, 8)).at(9)
    assert [list(chosen.within(first, 3)) for first in (0, 3, 6, 9)] == [[2], [5], [8], []]
    assert list(CaptureRequest(key="k", positions=range(2, 9)).within(1, 4)) == [2, 3, 4]
    whole = requested("all").at(9)
    assert [list(whole.within(first, 4)) for first in (0, 4, 8, 12)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8], []]


@pytest.mark.parametrize("positions", ["last", "all", (0, 2, -1)])
@pytest.mark.parametrize("blocks", [None, (1, 3)])
def test_the_wire_brings_a_capture_back(positions: Positions, blocks: tuple[int, ...] | None) -> None:
    placed = CaptureRequest(key="k", positions=positions, blocks=blocks, after=True).at(PROMPT_LEN)
    assert CaptureRequest.from_wire(json.loads(json.dumps(placed.to_wire()))) == placed
