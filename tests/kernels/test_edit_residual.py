"""`edit_residual` under the Triton interpreter, against the float64 oracle and the plain-torch reference."""

from __future__ import annotations

import pytest
import torch
from helpers.cases import (
    DTYPES,
    MAX_ADDS,
    SITE,
    SIZES,
    Case,
    Program,
    Step,
    adds,
    batches,
    build,
    each_detail,
    each_group,
    each_measure,
    single_operations,
)
from helpers.kernel_check import (
    FAR_ABOVE,
    assert_each_detail_shows,
    assert_each_measure_shows,
    assert_groups_show,
    assert_matches,
    assert_measured,
    oracle_of,
)
from helpers.kernel_process import Process
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steer_kernels.reference import edit_residual_reference

# The interpreter truncates float32 to bfloat16; hardware rounds to nearest.
INTERPRETED_ULPS = {torch.float32: 0.5, torch.float16: 0.5, torch.bfloat16: 1.0}


def edit(process: Process, case: Case) -> torch.Tensor:
    carried = case.carried.clone()
    process.call(
        "edit_residual.edit_residual",
        *(case.hidden, carried, case.tables, SITE),
        adds_only=case.adds_only,
        capture=case.capture,
    )
    return carried


@pytest.mark.parametrize("hidden_size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_operation_alone(interpreted: Process, dtype: torch.dtype, hidden_size: int) -> None:
    num_tokens = 40 if hidden_size < 4096 else 20
    case = build(single_operations(), hidden_size=hidden_size, dtype=dtype, num_tokens=num_tokens, seed=1, capture=True)
    expected = oracle_of(case)
    ratios = assert_matches(case, edit(interpreted, case), expected, ulps=INTERPRETED_ULPS[dtype])
    assert len(ratios) == num_tokens * 9 // 10
    slot_T = case.tables.slot_T[:num_tokens][expected.touched_T]
    for slot in range(1, 10):
        assert ratios[slot_T == slot].max() > FAR_ABOVE, f"operation {slot} has no visible effect"


@pytest.mark.parametrize("adds_only", [True, False])
@pytest.mark.parametrize("hidden_size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_to_four_adds_per_slot(
    interpreted: Process, dtype: torch.dtype, hidden_size: int, adds_only: bool
) -> None:
    """Against the oracle, and bit for bit against the reference for dtypes in which both round identically."""
    num_tokens = 64 if hidden_size < 4096 else 12
    programs = [adds(n) for n in range(MAX_ADDS + 1)]
    case = build(programs, hidden_size=hidden_size, dtype=dtype, num_tokens=num_tokens, seed=2, adds_only=adds_only)
    edited = edit(interpreted, case)
    ratios = assert_matches(case, edited, oracle_of(case), ulps=INTERPRETED_ULPS[dtype])
    assert ratios.max() > FAR_ABOVE
    if dtype != torch.bfloat16:
        reference = case.carried.clone()
        edit_residual_reference(case.hidden, reference, case.tables, SITE, adds_only=adds_only)
        assert torch.equal(edited, reference)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=batches,
    dtype=st.sampled_from(DTYPES),
    hidden_size=st.sampled_from([1, 63, 576]),
    seed=st.integers(0, 2**16),
    split=st.booleans(),
    batched=st.booleans(),
    capture=st.booleans(),
)
def test_random_mixes(
    interpreted: Process,
    batch: tuple[list[Program], bool],
    dtype: torch.dtype,
    hidden_size: int,
    seed: int,
    split: bool,
    batched: bool,
    capture: bool,
) -> None:
    programs, adds_only = batch
    case = build(
        programs,
        adds_only=adds_only,
        hidden_size=hidden_size,
        dtype=dtype,
        num_tokens=12,
        seed=seed,
        bank_dtype=torch.float32 if seed % 2 else dtype,
        split=split,
        batched=batched,
        capture=capture,
    )
    expected = oracle_of(case)
    assert_matches(case, edit(interpreted, case), expected, ulps=INTERPRETED_ULPS[dtype])


@pytest.mark.parametrize("hidden_size", [63, 576, 16384])
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_read_the_row_before_them(interpreted: Process, dtype: torch.dtype, hidden_size: int) -> None:
    """Up to eight entries a group, groups side by side, with gates on cosines and dot products, and schedules."""
    num_tokens = 9 * (2 if hidden_size > 4096 else 6)
    case = build(each_group(), hidden_size=hidden_size, dtype=dtype, num_tokens=num_tokens, seed=9)
    expected = oracle_of(case)
    assert assert_matches(case, edit(interpreted, case), expected, ulps=INTERPRETED_ULPS[dtype]).max() > FAR_ABOVE
    assert_groups_show(case, expected)


@pytest.mark.parametrize("adds_only", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_detail_alone(interpreted: Process, dtype: torch.dtype, adds_only: bool) -> None:
    """Triggers, exceptions, schedules and conditions; each edits some rows of its slot and not others."""
    programs = each_detail(adds_only=adds_only)
    num_tokens = 12 * (len(programs) + 1)
    case = build(programs, hidden_size=63, dtype=dtype, num_tokens=num_tokens, seed=7, adds_only=adds_only)
    expected = oracle_of(case)
    assert assert_matches(case, edit(interpreted, case), expected, ulps=INTERPRETED_ULPS[dtype]).max() > FAR_ABOVE
    assert_each_detail_shows(case, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_entries_measure(interpreted: Process, dtype: torch.dtype) -> None:
    """Sums and largest numbers of dot products and cosines, of the rows in the span, which are not edited."""
    case = build(each_measure(), hidden_size=576, dtype=dtype, num_tokens=60, seed=8)
    case.tables.measured_SQ[:] = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf, 0.0, 0.0, 0.0, 0.0])
    expected = oracle_of(case)
    edited = edit(interpreted, case)
    assert torch.equal(edited, case.carried)
    assert_measured(case, expected)
    assert_each_measure_shows(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_preserved_norm_and_a_gate(interpreted: Process, dtype: torch.dtype) -> None:
    """Rows on both sides of the gate, and rows whose norm would double without `keep_norm`."""
    gated = [Step(op="add", scale=8.0, gate=(4, 0.3, float("inf"))), Step(op="ablate", gate=(5, -float("inf"), -0.3))]
    programs = [Program(steps=gated), Program(steps=adds(2).steps, keep_norm=True)]
    case = build(programs, hidden_size=576, dtype=dtype, num_tokens=48, seed=3)
    expected = oracle_of(case)
    edited = edit(interpreted, case)
    assert assert_matches(case, edited, expected, ulps=INTERPRETED_ULPS[dtype]).max() > FAR_ABOVE
    gated_T = case.tables.slot_T[:48] == 1
    assert 0 < expected.touched_T[gated_T].sum() < int(gated_T.sum())
    kept_T = case.tables.slot_T[:48] == 2
    assert case.hidden is not None
    before_T = (case.hidden.double() + case.carried.double())[kept_T].norm(dim=1)
    after_T = (case.hidden.double() + edited.double())[kept_T].norm(dim=1)
    # Storing rounds once more, by at most one unit of the dtype.
    assert ((after_T / before_T - 1).abs() <= 2 * torch.finfo(dtype).eps).all()


def test_spans_exclude_their_end(interpreted: Process) -> None:
    case = build(
        [Program(steps=[Step(op="add", span=(5, 9))])],
        hidden_size=63,
        dtype=torch.float32,
        num_tokens=20,
        seed=4,
        adds_only=True,
    )
    case.tables.slot_T[:20] = 1
    case.tables.pos_T[:20] = torch.arange(20)
    changed_T = (edit(interpreted, case) != case.carried).any(1)
    assert changed_T.nonzero().squeeze(1).tolist() == [5, 6, 7, 8]


def test_rows_with_a_stride(interpreted: Process) -> None:
    """The stream is a slice of a wider buffer. The elements between its rows do not change."""
    case = build(single_operations(), hidden_size=63, dtype=torch.float32, num_tokens=12, seed=5)
    wide = torch.full((12, 80), 3.0)
    case.carried = wide[:, 8:71].copy_(case.carried)
    edited = wide.clone()
    interpreted.call(
        "edit_residual.edit_residual", case.hidden, edited[:, 8:71], case.tables, SITE, adds_only=False, capture=False
    )
    assert_matches(case, edited[:, 8:71], oracle_of(case), ulps=0.5)
    assert (edited[:, :8] == 3.0).all()
    assert (edited[:, 71:] == 3.0).all()


def test_what_a_device_computes_comes_back() -> None:
    """As on a GPU (STEER_TEST_KERNELS), where the kernel gets copies of the stream and of all tables."""
    process = Process(TRITON_INTERPRET="1", STEER_KERNEL_DEVICE="cpu")
    try:
        case = build(each_measure(), hidden_size=63, dtype=torch.float32, num_tokens=20, seed=8)
        expected = oracle_of(case)
        assert torch.equal(edit(process, case), case.carried)
        assert_measured(case, expected)
        test_rows_with_a_stride(process)
    finally:
        process.close()


@pytest.mark.parametrize("num_tokens", [0, 1])
def test_the_smallest_batches(interpreted: Process, num_tokens: int) -> None:
    case = build([adds(1)], hidden_size=63, dtype=torch.float32, num_tokens=num_tokens, seed=6, adds_only=True)
    case.tables.slot_T[:num_tokens] = 1
    assert_matches(case, edit(interpreted, case), oracle_of(case), ulps=0.5)
