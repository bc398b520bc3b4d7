"""Comparing what a kernel or a reference left behind with the oracle."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray
from steer_kernels.reference import rows_view
from steer_kernels.tables import PARALLEL, WHEN

from helpers.cases import HOLDS, SITE, Case, each_detail
from helpers.kernel_oracle import Expected, expect, store_error, to_float64

# An effect must exceed the bound of its error by this factor, or the comparison would show nothing. An edit as large as
# what it leaves behind exceeds it by 128 at the most in a bfloat16 that may round to either neighbour.
FAR_ABOVE = 50


def oracle_of(case: Case) -> Expected:
    """What `case` must become; call it before the case is edited."""
    hidden_TD = None if case.hidden is None else rows_view(case.hidden)
    return expect(hidden_TD, rows_view(case.carried), case.tables, SITE, adds_only=case.adds_only)


def assert_matches(case: Case, edited: torch.Tensor, expected: Expected, *, ulps: float) -> NDArray[np.float64]:
    """Every row within its bound, untouched rows to the bit. Returns effect / bound of each touched, decided row.

    case.carried is the stream before the edit; ulps is how the side under test rounds to the stream's dtype.
    """
    assert torch.isfinite(edited.float()).all()
    assert expected.decided_T.sum() * 2 >= len(expected.decided_T), "too many gates are too close to call"
    before_TD, edited_TD = rows_view(case.carried), rows_view(edited)
    bound_TD = store_error(expected.carried_TD, expected.error_TD, edited.dtype, ulps=ulps)
    wrong_TD = np.abs(to_float64(edited_TD) - expected.carried_TD) > bound_TD
    wrong_TD[~expected.decided_T] = False
    assert not wrong_TD.any(), f"rows {np.flatnonzero(wrong_TD.any(1))} are beyond their bound"
    silent_T = torch.from_numpy(expected.decided_T & ~expected.touched_T)
    assert torch.equal(before_TD[silent_T], edited_TD[silent_T]), "a row without an edit has changed"
    assert_measured(case, expected)
    assert_probed(case, expected)
    if case.capture:
        after_TD = edited_TD.float() if case.hidden is None else rows_view(case.hidden).float() + edited_TD.float()
        assert_captured(case, expected, after_TD, ulps=ulps)
    shown_T = expected.decided_T & expected.touched_T
    return np.abs(expected.delta_TD[shown_T]).max(1) / bound_TD[shown_T].max(1)


def assert_measured(case: Case, expected: Expected) -> None:
    """The numbers of all conditions, after the edit."""
    number_SQ = to_float64(case.tables.measured_SQ)
    near_SQ = np.abs(np.nan_to_num(number_SQ) - np.nan_to_num(expected.measured_SQ)) <= expected.measured_error_SQ
    wrong_SQ = ~(near_SQ | (number_SQ == expected.measured_SQ))
    assert not wrong_SQ.any(), f"(slot, condition) {np.argwhere(wrong_SQ).tolist()} are beyond their bound"


def assert_probed(case: Case, expected: Expected) -> None:
    """The numbers of all probes; everything else in the buffer is NaN, as the host has left it."""
    if case.tables.probed_TK is None:
        return
    num_tokens = len(expected.probed_TK)
    number_TK, chosen_T = to_float64(case.tables.probed_TK), expected.decided_T
    assert np.isnan(number_TK[num_tokens:]).all(), "a row beyond the batch was written"
    number_TK = number_TK[:num_tokens]
    assert (np.isnan(number_TK) == np.isnan(expected.probed_TK)).all(), "the wrong numbers were written"
    near_TK = np.abs(number_TK - expected.probed_TK) <= expected.probed_error_TK
    wrong_TK = ~(near_TK | np.isnan(expected.probed_TK)) & chosen_T[:, None]
    assert not wrong_TK.any(), f"(row, probe) {np.argwhere(wrong_TK).tolist()} are beyond their bound"


def assert_each_detail_shows(case: Case, expected: Expected) -> None:
    """In each slot of `each_detail`, the detail leaves out some rows or weakens them; conditions decide for all."""
    slot_T = case.tables.slot_T[: len(expected.touched_T)].numpy()
    size_T = np.abs(expected.delta_TD).max(1)
    for slot, program in enumerate(each_detail(adds_only=case.adds_only), start=1):
        step, size_N = program.steps[0], size_T[slot_T == slot]
        answers = [holds for q, holds in enumerate(HOLDS) if step.conditions >> q & 1]
        if not (any(answers) if step.any_condition else all(answers)):
            assert size_N.max() == 0, f"the conditions of slot {slot} do not hold"
        elif step == replace(step, trigger=-1, exclude=-1, schedule=None):
            assert size_N.min() > 0, f"the conditions of slot {slot} hold"
        else:
            assert size_N.min() <= size_N.max() / 2, f"the detail of slot {slot} has no visible effect"
            assert size_N.max() > 0, f"slot {slot} is never edited"


def assert_groups_show(case: Case, expected: Expected) -> None:
    """The same entries one after the other, each reading what the one before has written, give other rows."""
    entries_SEW, chained = case.tables.entries_SLEW[:, SITE], case.tables.entries_SLEW[:, SITE].clone()
    chained[..., WHEN] &= ~(3 << PARALLEL[0])
    grouped_S = (chained != entries_SEW).flatten(1).any(1)
    with_groups = entries_SEW.clone()
    entries_SEW.copy_(chained)
    differs_T = np.abs(oracle_of(case).carried_TD - expected.carried_TD).max(1) > FAR_ABOVE * expected.error_TD.max(1)
    entries_SEW.copy_(with_groups)
    slots = case.tables.slot_T[: len(differs_T)][torch.from_numpy(differs_T)].unique()
    assert int(grouped_S[1:].sum()) >= 5
    # A group of one entry, and the one without groups, read what they would read alone.
    assert len(slots) >= 4 or case.carried.shape[-1] == 1, slots


def assert_each_measure_shows(case: Case) -> None:
    """Every condition of `each_measure` has a number, and no other has."""
    shown_SQ = case.tables.measured_SQ[1:].isfinite() & (case.tables.measured_SQ[1:] != 0)
    assert shown_SQ[:, :4].tolist() == [
        [True, True, False, False], [False, False, True, True],
        [True, False, False, False], [False, False, False, True],
    ]  # fmt: skip
    assert not shown_SQ[:, 4:].any()


def assert_captured(case: Case, expected: Expected, after_TD: torch.Tensor, *, ulps: float) -> None:
    """The rows that were asked for hold x before the edit, or to the bit what it left; nothing else was written.

    after_TD: float32, the stream that the side under test left behind.
    """
    captured_MCD, capture_T = case.tables.captured_MCD, case.tables.capture_T
    assert captured_MCD is not None
    assert capture_T is not None
    asked_T = capture_T[: len(expected.x_TD)]
    late_N = (asked_T < 0).nonzero().squeeze(1)
    assert torch.equal(captured_MCD[SITE, -asked_T[late_N].long() - 1], after_TD[late_N])
    rows_N = (asked_T > 0).nonzero().squeeze(1)
    assert len(rows_N) > 0
    places_N = asked_T[rows_N].long() - 1
    bound_ND = store_error(expected.x_TD, expected.x_error_TD, captured_MCD.dtype, ulps=ulps)[rows_N]
    assert (np.abs(to_float64(captured_MCD[SITE, places_N]) - expected.x_TD[rows_N]) <= bound_ND).all()
    rest_MCD = captured_MCD.clone()
    rest_MCD[SITE, asked_T[asked_T != 0].abs().long() - 1] = 0
    assert not rest_MCD.any()
