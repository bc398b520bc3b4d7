"""Probes, which write one number per row: kernels and references against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from helpers.cases import (
    DTYPES,
    MAX_ADDS,
    PROBE_LIMITS,
    SITE,
    Case,
    Program,
    Step,
    adds,
    build,
    each_probe,
    probed_mixes,
)
from helpers.kernel_check import assert_matches, assert_probed, oracle_of
from helpers.kernel_oracle import Expected
from helpers.kernel_process import Process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steer_kernels.reference import add_rms_norm_edit_reference, edit_residual_reference, rows_view
from steer_kernels.tables import COSINE, DOT

from .test_edit_residual import INTERPRETED_ULPS, edit

EPSILON = 1e-5
FORMS = ["reference", "kernel"]


def edit_by_reference(case: Case) -> torch.Tensor:
    carried = case.carried.clone()
    edit_residual_reference(case.hidden, carried, case.tables, SITE, adds_only=False, capture=case.capture)
    return carried


def editor(form: str, process: Process) -> tuple[Callable[[Case], torch.Tensor], dict[torch.dtype, float]]:
    """What edits a case, and how it rounds."""
    if form == "reference":
        return edit_by_reference, dict.fromkeys(DTYPES, 0.5)
    return (lambda case: edit(process, case)), INTERPRETED_ULPS


def assert_each_probe_shows(case: Case, expected: Expected) -> None:
    """Each column has numbers far beyond their bound, none where it must have none; late numbers differ from early."""
    filled_TK = ~np.isnan(expected.probed_TK)
    assert filled_TK.any(0).tolist() == [True, False, True, True, True, False]
    shown_TK = np.abs(np.nan_to_num(expected.probed_TK)) > 1000 * expected.probed_error_TK
    assert (shown_TK & filled_TK).sum() > 0.8 * filled_TK.sum()
    slot_T = case.tables.slot_T[: len(filled_TK)].numpy()
    first = len(each_probe()) - len(PROBE_LIMITS)
    for slot, limit in enumerate(PROBE_LIMITS, start=first):
        share = filled_TK[slot_T == slot][:, [0, 4]].mean(0)
        assert share[0] == share[1]
        if "conditions" in limit:
            assert share[0] == (limit["conditions"] == 1)
        else:
            assert share[0] == 1 if limit.get("schedule") == (20, 0.25, True) else 0 < share[0] < 1


@pytest.mark.parametrize("split", [True, False], ids=["split", "one tensor"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_each_probe(interpreted: Process, form: str, dtype: torch.dtype, split: bool) -> None:
    programs = each_probe()
    num_tokens = 13 * (len(programs) + 1)
    case = build(programs, hidden_size=576, dtype=dtype, num_tokens=num_tokens, seed=1, split=split, probes=True)
    edit_it, ulps = editor(form, interpreted)
    expected = oracle_of(case)
    edited = edit_it(case)
    assert_matches(case, edited, expected, ulps=ulps[dtype])
    assert_each_probe_shows(case, expected)
    # Slots that only have probes.
    silent_T = torch.isin(case.tables.slot_T[:num_tokens], torch.tensor([0, 1, 5], dtype=torch.int32))
    assert torch.equal(edited[silent_T], case.carried[silent_T])


@pytest.mark.parametrize("hidden_size", [1, 63, 4096, 16384])
@pytest.mark.parametrize("form", FORMS)
def test_every_size(interpreted: Process, form: str, hidden_size: int) -> None:
    programs = each_probe()[:6]
    case = build(programs, hidden_size=hidden_size, dtype=torch.bfloat16, num_tokens=14, seed=2, probes=True)
    edit_it, ulps = editor(form, interpreted)
    expected = oracle_of(case)
    assert_matches(case, edit_it(case), expected, ulps=ulps[torch.bfloat16])
    assert not np.isnan(expected.probed_TK[:, [0, 2, 3, 4]]).all(0).any()


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    programs=probed_mixes,
    dtype=st.sampled_from(DTYPES),
    hidden_size=st.sampled_from([63, 576]),
    seed=st.integers(0, 2**16),
    split=st.booleans(),
    batched=st.booleans(),
    capture=st.booleans(),
)
@pytest.mark.parametrize("form", FORMS)
def test_random_mixes(
    interpreted: Process,
    form: str,
    programs: list[Program],
    dtype: torch.dtype,
    hidden_size: int,
    seed: int,
    split: bool,
    batched: bool,
    capture: bool,
) -> None:
    """Probes anywhere in a program, with all that limits an entry."""
    case = build(
        programs,
        hidden_size=hidden_size,
        dtype=dtype,
        num_tokens=18,
        seed=seed,
        bank_dtype=torch.float32 if seed % 2 else dtype,
        split=split,
        batched=batched,
        capture=capture,
        probes=True,
    )
    edit_it, ulps = editor(form, interpreted)
    expected = oracle_of(case)
    assert_matches(case, edit_it(case), expected, ulps=ulps[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
def test_in_the_fused_norm(interpreted: Process, form: str, dtype: torch.dtype) -> None:
    """Late probes measure the edited stream, not what the norm makes of it."""
    programs = each_probe()
    case = build(programs, hidden_size=63, dtype=dtype, num_tokens=5 * (len(programs) + 1), seed=3, probes=True)
    assert case.hidden is not None
    expected = oracle_of(case)
    hidden, residual = case.hidden.clone(), case.carried.clone()
    arguments = (hidden, residual, torch.ones(63, dtype=dtype), case.tables, SITE)
    options = {"epsilon": EPSILON, "adds_only": False, "capture": False}
    if form == "reference":
        add_rms_norm_edit_reference(*arguments, **options)  # type: ignore[arg-type]
    else:
        interpreted.call("add_rms_norm_edit.add_rms_norm_edit", *arguments, **options)
    assert_probed(case, expected)
    case.tables.probed_TK = None
    plain = case.hidden.float() + case.carried.float()
    silent_T = torch.from_numpy(~expected.touched_T)
    assert torch.equal(residual[silent_T], plain.to(dtype)[silent_T]) or form == "kernel"
    assert torch.isfinite(hidden.float()).all()


@pytest.mark.parametrize("form", FORMS)
def test_the_number_is_not_scaled_by_a_schedule(interpreted: Process, form: str) -> None:
    probes = [Step(op="ablate", probe=(DOT, 0, False)), Step(op="ablate", probe=(DOT, 1, True))]
    fading = [Step(op=step.op, probe=step.probe, schedule=(50, 0.125, True)) for step in probes]
    numbers = []
    for steps in (probes, fading):
        case = build([Program(steps=steps)], hidden_size=63, dtype=torch.float32, num_tokens=8, seed=4, probes=True)
        editor(form, interpreted)[0](case)
        assert case.tables.probed_TK is not None
        numbers.append(case.tables.probed_TK[1:8:2, :2])
    assert torch.isfinite(numbers[0]).all()
    assert torch.equal(*numbers)


@pytest.mark.parametrize("form", FORMS)
def test_a_probe_counts_for_no_condition(interpreted: Process, form: str) -> None:
    steps = [Step(op="ablate", probe=(kind, kind, late)) for kind in (DOT, COSINE) for late in (False, True)]
    case = build([Program(steps=steps)], hidden_size=63, dtype=torch.float32, num_tokens=8, seed=5, probes=True)
    before_SQ = case.tables.measured_SQ.clone()
    editor(form, interpreted)[0](case)
    assert torch.equal(case.tables.measured_SQ, before_SQ)
    assert case.tables.probed_TK is not None
    assert case.tables.probed_TK[1:8:2, [DOT, COSINE]].isfinite().all()


@pytest.mark.parametrize("form", FORMS)
def test_an_unprobed_row_keeps_its_numbers(interpreted: Process, form: str) -> None:
    """Numbers, not NaN, so that a write of NaN would show."""
    case = build([adds(2), each_probe()[0]], hidden_size=63, dtype=torch.bfloat16, num_tokens=12, seed=6, probes=True)
    probed_TK = case.tables.probed_TK
    assert probed_TK is not None
    probed_TK.copy_(torch.arange(probed_TK.numel(), dtype=torch.float32).view(probed_TK.shape))
    before_TK = probed_TK.clone()
    editor(form, interpreted)[0](case)
    changed_TK = probed_TK != before_TK
    assert changed_TK.any(1).tolist() == [*(row % 3 == 2 for row in range(12)), False, False, False]
    assert changed_TK.any(0).nonzero().squeeze(1).tolist() == [0, 2]


@pytest.mark.parametrize("form", FORMS)
def test_a_column_is_not_taken_for_a_gate(interpreted: Process, form: str) -> None:
    """The bank has fewer rows than the number of the column."""
    steps = [Step(op="ablate", probe=(DOT, 11, False)), Step(op="add", scale=8.0)]
    case = build([Program(steps=steps)], hidden_size=63, dtype=torch.float32, num_tokens=8, seed=9, probes=True)
    case.tables.probed_TK = torch.full((11, 12), torch.nan)
    expected = oracle_of(case)
    assert_matches(case, editor(form, interpreted)[0](case), expected, ulps=0.5)


def test_an_engine_that_only_adds_has_no_probes(interpreted: Process) -> None:
    case = build([adds(MAX_ADDS)], hidden_size=63, dtype=torch.float32, num_tokens=4, seed=7, probes=True)
    with pytest.raises(AssertionError, match="has no probes"):
        edit_residual_reference(case.hidden, rows_view(case.carried), case.tables, SITE, adds_only=True)
    case.adds_only = True
    with pytest.raises(AssertionError, match="has no probes"):
        edit(interpreted, case)
