"""Which positions of a sequence a capture request names, and captured rows in the requested order."""

from __future__ import annotations

import json

import numpy as np
import pytest

from steer_engine.capture import CaptureRequest, Positions, Scope
from steer_engine.errors import SteeringRequestError
from steer_engine.site import Site, points_at

PROMPT_LEN = 6
MOST = 5
"""Tokens of an answer, at most."""


def requested(positions: Positions, max_rows: int | None = None, scope: Scope = "prompt") -> CaptureRequest:
    return CaptureRequest(key="k", positions=positions, scope=scope, points=(1, 3), after=True, max_rows=max_rows)


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
    placed = requested(positions).at(PROMPT_LEN, MOST)
    assert placed == CaptureRequest(key="k", positions=expected, points=(1, 3), after=True)
    assert type(placed.positions) is type(expected), "a long range stays two numbers"


@pytest.mark.parametrize("number", [6, -7, 100])
def test_a_position_outside_the_prompt(number: int) -> None:
    with pytest.raises(SteeringRequestError, match=f"position {number} is outside .* which has 6 tokens") as caught:
        requested((0, number)).at(PROMPT_LEN, MOST)
    assert caught.value.param == "steering.capture.positions"


@pytest.mark.parametrize(("positions", "rows"), [("all", 6), ("mean", 6), ("last", 1), ((0, 0, 0), 3)])
def test_the_limit_counts_captured_and_returned_rows(positions: Positions, rows: int) -> None:
    assert requested(positions, max_rows=rows).at(PROMPT_LEN, MOST).max_rows is None
    with pytest.raises(SteeringRequestError, match=f"{rows} token rows .* limit of {rows - 1} ") as caught:
        requested(positions, max_rows=rows - 1).at(PROMPT_LEN, MOST)
    assert caught.value.param == "steering.capture.positions"


def captured(positions: Positions) -> np.ndarray:
    """What the workers would return, float32 [2, P, 1]: position p of block b is 10 b + p."""
    placed = requested(positions).at(PROMPT_LEN, MOST)
    found = np.array(placed.within(0, PROMPT_LEN), dtype=np.float32)
    return (found + np.array([[10], [30]], dtype=np.float32))[:, :, None]


@pytest.mark.parametrize(
    ("positions", "expected"), [("last", [5]), ("all", [0, 1, 2, 3, 4, 5]), ((-1, 0, -1), [5, 0, 5]), ((2,), [2])]
)
def test_rows_come_in_the_requested_order(positions: Positions, expected: list[int]) -> None:
    found, rows_LPD = requested(positions).arranged(captured(positions), PROMPT_LEN, MOST)
    assert found == expected
    assert rows_LPD[0, :, 0].tolist() == [10 + position for position in expected]
    assert rows_LPD[1, :, 0].tolist() == [30 + position for position in expected]


def test_a_mean_is_one_row_in_float32() -> None:
    found, rows_LPD = requested("mean").arranged(captured("mean"), PROMPT_LEN, MOST)
    assert found == list(range(6))
    assert rows_LPD.tolist() == [[[12.5]], [[32.5]]]
    assert rows_LPD.dtype == np.float32


def test_missing_rows_are_an_error() -> None:
    with pytest.raises(RuntimeError, match="6 token rows were expected, 5 were captured"):
        requested("all").arranged(captured("all")[:, :5], PROMPT_LEN, MOST)


def test_positions_within_a_chunk() -> None:
    chosen = requested((2, 5, 8)).at(9, MOST)
    assert [list(chosen.within(first, 3)) for first in (0, 3, 6, 9)] == [[2], [5], [8], []]
    assert list(CaptureRequest(key="k", positions=range(2, 9), points=(1,)).within(1, 4)) == [2, 3, 4]
    whole = requested("all").at(9, MOST)
    assert [list(whole.within(first, 4)) for first in (0, 4, 8, 12)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8], []]


SPANS: dict[Scope, range] = {
    "generation": range(PROMPT_LEN - 1, PROMPT_LEN - 1 + MOST),
    "all": range(PROMPT_LEN - 1 + MOST),
}


@pytest.mark.parametrize("scope", SPANS)
@pytest.mark.parametrize("positions", ["last", "mean", "all"])
def test_an_answer_is_captured_up_to_its_longest_end(scope: Scope, positions: Positions) -> None:
    """Whichever row is returned: which token is the last is known only when it has come."""
    placed = requested(positions, scope=scope).at(PROMPT_LEN, MOST)
    assert placed == CaptureRequest(key="k", positions=SPANS[scope], scope=scope, points=(1, 3), after=True)
    assert [position for position in range(30) if placed.keeps(position)] == list(SPANS[scope])


@pytest.mark.parametrize("scope", SPANS)
def test_every_row_of_an_answer_is_named_where_the_host_counts_too_high(scope: Scope) -> None:
    placed = requested("all", scope=scope).at(PROMPT_LEN, MOST)
    start = SPANS[scope].start
    assert list(placed.within(0, PROMPT_LEN)) == list(range(start, PROMPT_LEN))
    assert list(placed.within(PROMPT_LEN, 4)) == list(range(PROMPT_LEN, PROMPT_LEN + 4))
    beyond = SPANS[scope].stop + 2  # as if three drafts had been accepted
    assert list(placed.within(beyond, 4)) == list(range(beyond, beyond + 4))
    assert not placed.keeps(beyond)


def test_only_the_prompt_is_not_in_a_cache() -> None:
    read = {scope: requested("all", scope=scope).reads_prompt for scope in ("prompt", "generation", "all")}
    assert read == {"prompt": True, "generation": False, "all": True}


def test_where_an_answer_ends() -> None:
    assert requested("all").end(PROMPT_LEN, 3) is None
    assert requested("all", scope="generation").end(PROMPT_LEN, 3) == PROMPT_LEN + 2
    assert requested("mean", scope="all").end(PROMPT_LEN, 1) == PROMPT_LEN
    assert requested("mean", scope="all").end(PROMPT_LEN, 0) == PROMPT_LEN - 1


@pytest.mark.parametrize(("scope", "rows"), [("generation", MOST), ("all", PROMPT_LEN - 1 + MOST)])
@pytest.mark.parametrize("positions", ["last", "mean", "all"])
def test_the_limit_counts_the_longest_answer(scope: Scope, rows: int, positions: Positions) -> None:
    assert requested(positions, max_rows=rows, scope=scope).at(PROMPT_LEN, MOST).max_rows is None
    told = f"up to {rows} token rows; .* limit of {rows - 1} .max_capture_bytes.. Set max_tokens to at most {MOST - 1},"
    with pytest.raises(SteeringRequestError, match=told) as caught:
        requested(positions, max_rows=rows - 1, scope=scope).at(PROMPT_LEN, MOST)
    assert caught.value.param == "steering.capture.scope"
    requested(positions, max_rows=rows - 1, scope=scope).at(PROMPT_LEN, MOST - 1)


def test_a_prompt_that_leaves_no_room_for_an_answer() -> None:
    with pytest.raises(SteeringRequestError, match="Use scope 'generation' or a shorter prompt"):
        requested("all", max_rows=PROMPT_LEN - 1, scope="all").at(PROMPT_LEN, MOST)
    requested("all", max_rows=PROMPT_LEN, scope="all").at(PROMPT_LEN, 1)


@pytest.mark.parametrize("scope", SPANS)
@pytest.mark.parametrize("num_tokens", [1, 3, MOST])
def test_one_row_for_each_token_of_the_answer(scope: Scope, num_tokens: int) -> None:
    numbers = list(range(SPANS[scope].start, PROMPT_LEN - 1 + num_tokens))
    rows_LPD = (np.array(numbers, dtype=np.float32) + np.array([[10], [30]], dtype=np.float32))[:, :, None]
    found, rows = requested("all", scope=scope).arranged(rows_LPD, PROMPT_LEN, num_tokens)
    assert (found, rows.tolist()) == (numbers, rows_LPD.tolist())
    found, rows = requested("last", scope=scope).arranged(rows_LPD, PROMPT_LEN, num_tokens)
    assert (found, rows[0].tolist()) == ([PROMPT_LEN - 2 + num_tokens], [[10.0 + PROMPT_LEN - 2 + num_tokens]])
    found, rows = requested("mean", scope=scope).arranged(rows_LPD, PROMPT_LEN, num_tokens)
    assert (found, rows[:, :, 0].tolist()) == (numbers, [[10 + np.mean(numbers)], [30 + np.mean(numbers)]])
    for wrong in (num_tokens - 1, num_tokens + 1):
        with pytest.raises(RuntimeError, match="token rows were expected"):
            requested("all", scope=scope).arranged(rows_LPD, PROMPT_LEN, wrong)


@pytest.mark.parametrize("positions", ["last", "mean", "all"])
def test_an_answer_without_a_token_has_no_row(positions: Positions) -> None:
    none_L0D = np.zeros((6, 0, 1), dtype=np.float32)  # of an engine that captures at more points
    found, rows = requested(positions, scope="generation").arranged(none_L0D, PROMPT_LEN, 0)
    assert (found, rows.shape) == ([], (2, 0, 1))


@pytest.mark.parametrize(
    ("positions", "scope"), [("last", "prompt"), ((0, 2, -1), "prompt"), ("all", "generation"), ("mean", "all")]
)
@pytest.mark.parametrize("site", Site)
def test_the_wire_brings_a_capture_back(positions: Positions, scope: Scope, site: Site) -> None:
    points = points_at((1, 3), site)
    capture = CaptureRequest(key="k", positions=positions, scope=scope, points=points, after=True)
    assert (capture.blocks, capture.site) == ((1, 3), site)
    placed = capture.at(PROMPT_LEN, MOST)
    assert CaptureRequest.from_wire(json.loads(json.dumps(placed.to_wire()))) == placed
