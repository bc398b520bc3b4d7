"""What a request may read of its prompt, and the rows in the order asked."""

from __future__ import annotations

import numpy as np
import pytest

from steer_engine.capture import CaptureRequest, Positions
from steer_engine.errors import SteeringRequestError
from steer_engine.program import Capture

PROMPT_LEN = 6


def asked(positions: Positions, max_rows: int | None = None) -> CaptureRequest:
    return CaptureRequest(key="k", positions=positions, blocks=(1, 3), after=True, max_rows=max_rows)


@pytest.mark.parametrize(
    ("positions", "start", "end", "only"),
    [
        ("last", 5, 6, None),
        ("all", 0, 6, None),
        ("mean", 0, 6, None),
        ((-1,), 5, 6, None),
        ((0,), 0, 1, None),
        ((3, -4, 4, 3), 2, 5, None),  # 2, 3 and 4
        ((-1, 0, 2, -6), 0, 6, (0, 2, 5)),
    ],
)
def test_what_the_workers_read(positions: Positions, start: int, end: int, only: tuple[int, ...] | None) -> None:
    expected = Capture(key="k", start=start, end=end, only=only, blocks=(1, 3), after=True)
    assert asked(positions).at(PROMPT_LEN) == expected


@pytest.mark.parametrize("number", [6, -7, 100])
def test_a_position_that_the_prompt_has_not(number: int) -> None:
    with pytest.raises(SteeringRequestError, match=f"the prompt has 6 tokens, and no position {number}") as caught:
        asked((0, number)).at(PROMPT_LEN)
    assert caught.value.param == "steering.capture.positions"


@pytest.mark.parametrize(("positions", "rows"), [("all", 6), ("mean", 6), ("last", 1), ((0, 0, 0), 3)])
def test_rows_are_counted_as_they_are_returned_or_read(positions: Positions, rows: int) -> None:
    asked(positions, max_rows=rows).at(PROMPT_LEN)
    with pytest.raises(SteeringRequestError, match=f"{rows} token rows .* at most {rows - 1}"):
        asked(positions, max_rows=rows - 1).at(PROMPT_LEN)


def read(positions: Positions) -> np.ndarray:
    """What the workers would hand out, float32 [2, P, 1]: position p of block b is 10 b + p."""
    capture = asked(positions).at(PROMPT_LEN)
    found = np.array(capture.within(0, PROMPT_LEN), dtype=np.float32)
    return (found + np.array([[10], [30]], dtype=np.float32))[:, :, None]


@pytest.mark.parametrize(
    ("positions", "expected"), [("last", [5]), ("all", [0, 1, 2, 3, 4, 5]), ((-1, 0, -1), [5, 0, 5]), ((2,), [2])]
)
def test_rows_come_in_the_order_asked(positions: Positions, expected: list[int]) -> None:
    found, rows_LPD = asked(positions).arranged(read(positions), PROMPT_LEN)
    assert found == expected
    assert rows_LPD[0, :, 0].tolist() == [10 + position for position in expected]
    assert rows_LPD[1, :, 0].tolist() == [30 + position for position in expected]


def test_a_mean_is_one_row_in_float32() -> None:
    found, rows_LPD = asked("mean").arranged(read("mean"), PROMPT_LEN)
    assert found == list(range(6))
    assert rows_LPD.tolist() == [[[12.5]], [[32.5]]]
    assert rows_LPD.dtype == np.float32


def test_rows_that_are_missing_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="6 token rows were to be read, and 5 were"):
        asked("all").arranged(read("all")[:, :5], PROMPT_LEN)


def test_chosen_positions_of_a_chunk() -> None:
    capture = Capture(key="k", start=2, end=9, only=(2, 5, 8))
    assert [list(capture.within(first, 3)) for first in (0, 3, 6, 9)] == [[2], [5], [8], []]
    assert list(Capture(key="k", start=2, end=9).within(1, 4)) == [2, 3, 4]
