"""The numbers of one request in the engine core: by position, whatever order their rows come in."""

from __future__ import annotations

from math import inf

import numpy as np

from steer_engine.engine.probe_numbers import ProbeNumbers
from steer_engine.probe import ProbePlan, StopRule

P = 5


def rows(*positions: int, offset: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """Row p holds p and -p."""
    at = np.array(positions, dtype=np.int64)
    return at, np.stack([at + offset, -at - offset], axis=1).astype(np.float32)


def numbers(start: int = P - 1, *stops: StopRule) -> ProbeNumbers:
    return ProbeNumbers(ProbePlan(((0, 1),), start, stops), P)


def test_token_g_has_the_row_of_position_p_minus_1_plus_g() -> None:
    kept = numbers()
    kept.write(*rows(4))
    prompt, tokens = kept.take(1)
    assert len(prompt) == 0
    assert tokens.tolist() == [[4.0, -4.0]]
    kept.write(*rows(5, 6, 7))  # two drafts, one of which is rejected
    assert kept.take(2)[1][:, 0].tolist() == [5.0, 6.0]
    kept.write(*rows(7, 8, offset=0.5))
    assert kept.take(2)[1][:, 0].tolist() == [7.5, 8.5]


def test_the_prompt_comes_once_with_the_first_tokens_whatever_its_chunks() -> None:
    kept = numbers(1)
    kept.write(*rows(2, 3))
    kept.write(*rows(1, 2))  # computed again after a preemption; position 0 is not measured
    kept.write(*rows(3, 4))
    prompt, tokens = kept.take(1)
    assert np.isnan(prompt[0]).all()
    assert prompt[1:, 0].tolist() == [1.0, 2.0, 3.0]
    assert tokens[:, 0].tolist() == [4.0]
    kept.write(*rows(0, 1, 2, 3, 4, 5, offset=9.0))
    prompt, tokens = kept.take(1)
    assert len(prompt) == 0
    assert tokens[:, 0].tolist() == [14.0]


def test_rows_of_returned_tokens_are_not_kept() -> None:
    kept = numbers()
    kept.write(*rows(4, 5))
    kept.take(2)
    kept.write(*rows(4, 5, 6))
    assert list(kept._rows) == [6]


def test_a_missing_row_is_not_a_number() -> None:
    assert np.isnan(numbers().take(1)[1]).all()


def test_a_row_of_a_wider_neighbour_is_cut() -> None:
    kept = numbers()
    at, wide = rows(4)
    kept.write(at, np.concatenate([wide, wide], axis=1))
    assert kept.take(1)[1].shape == (1, 2)


def test_a_rule_counts_over_steps_and_fires_once_it_is_full() -> None:
    kept = numbers(P - 1, StopRule("x", 0, 4.5, inf, 3))
    kept.write(*rows(4, 5))
    assert kept.stopped_by(0, 2) is None  # 4 does not hold, 5 does
    kept.take(2)
    kept.write(*rows(6, 7, 8))
    assert kept.stopped_by(2, 3) == (2, "x")  # 5, 6, 7


def test_a_rule_starts_again_after_a_token_that_does_not_hold_or_has_no_number() -> None:
    kept = numbers(P - 1, StopRule("x", 1, -inf, 0.0, 2))
    at, row = rows(4, 5, 6, 7)
    row[1, 1], row[2, 1] = np.nan, 1.0
    kept.write(at, row)
    assert kept.stopped_by(0, 4) is None
    kept.write(*rows(8))
    kept.take(4)
    assert kept.stopped_by(4, 1) == (1, "x")


def test_no_rule_fires_before_the_least_number_of_tokens() -> None:
    kept = numbers(P - 1, StopRule("x", 0, -inf, inf, 1), StopRule("y", 0, -inf, inf, 1))
    kept.write(*rows(4, 5, 6))
    assert kept.stopped_by(0, 3, min_tokens=3) == (3, "x")


def test_columns_of_monitors_follow_those_of_the_request() -> None:
    kept = ProbeNumbers(ProbePlan(((0,), (1,)), P - 1, (), num_watched=1), P)
    assert kept.num_own == 1
    kept.write(*rows(4, 5))
    assert kept.take(2)[1].tolist() == [[4.0, -4.0], [5.0, -5.0]]
    assert ProbeNumbers(ProbePlan(((0, 1),), P - 1), P).num_own == 2
