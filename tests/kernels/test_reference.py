"""The plain-torch references, which a CPU engine runs, against the float64 oracle."""

from __future__ import annotations

import subprocess
import sys

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
from hypothesis import given, settings
from hypothesis import strategies as st
from steer_kernels.reference import edit_residual_reference, rows_view


def edit(case: Case) -> torch.Tensor:
    carried = case.carried.clone()
    edit_residual_reference(case.hidden, carried, case.tables, SITE, adds_only=case.adds_only, capture=case.capture)
    return carried


@pytest.mark.parametrize("hidden_size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_operation_alone(dtype: torch.dtype, hidden_size: int) -> None:
    case = build(single_operations(), hidden_size=hidden_size, dtype=dtype, num_tokens=40, seed=1, capture=True)
    expected = oracle_of(case)
    ratios = assert_matches(case, edit(case), expected, ulps=0.5)
    assert len(ratios) == 36
    slot_T = case.tables.slot_T[:40][expected.touched_T]
    for slot in range(1, 10):
        assert ratios[slot_T == slot].max() > FAR_ABOVE, f"operation {slot} has no visible effect"


@pytest.mark.parametrize("hidden_size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_read_the_row_before_them(dtype: torch.dtype, hidden_size: int) -> None:
    case = build(each_group(), hidden_size=hidden_size, dtype=dtype, num_tokens=54, seed=9)
    expected = oracle_of(case)
    assert assert_matches(case, edit(case), expected, ulps=0.5).max() > FAR_ABOVE
    assert_groups_show(case, expected)


@pytest.mark.parametrize(("hidden_size", "num_tokens"), [(576, 2048), (4096, 512)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_large_batch_of_programs(dtype: torch.dtype, hidden_size: int, num_tokens: int) -> None:
    programs = [*single_operations(), *(adds(n) for n in range(MAX_ADDS + 1))]
    programs += [Program(steps=[Step(op="ablate"), *adds(3).steps], keep_norm=True)]
    case = build(programs, hidden_size=hidden_size, dtype=dtype, num_tokens=num_tokens, seed=2)
    ratios = assert_matches(case, edit(case), oracle_of(case), ulps=0.5)
    assert len(ratios) > num_tokens / 2
    assert ratios.max() > FAR_ABOVE


@settings(deadline=None, max_examples=60)
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
        num_tokens=24,
        seed=seed,
        bank_dtype=torch.float32 if seed % 2 else dtype,
        split=split,
        batched=batched,
        capture=capture,
    )
    expected = oracle_of(case)
    assert_matches(case, edit(case), expected, ulps=0.5)


@pytest.mark.parametrize("adds_only", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_detail_alone(dtype: torch.dtype, adds_only: bool) -> None:
    """Triggers, exceptions, schedules and conditions; each edits some rows of its slot and not others."""
    programs = each_detail(adds_only=adds_only)
    num_tokens = 12 * (len(programs) + 1)
    case = build(programs, hidden_size=63, dtype=dtype, num_tokens=num_tokens, seed=7, adds_only=adds_only)
    expected = oracle_of(case)
    assert assert_matches(case, edit(case), expected, ulps=0.5).max() > FAR_ABOVE
    assert_each_detail_shows(case, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_entries_measure(dtype: torch.dtype) -> None:
    """Sums and largest numbers of dot products and cosines, of the rows in the span, which are not edited."""
    case = build(each_measure(), hidden_size=576, dtype=dtype, num_tokens=60, seed=8)
    case.tables.measured_SQ[:] = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf, 0.0, 0.0, 0.0, 0.0])
    expected = oracle_of(case)
    edited = edit(case)
    assert torch.equal(edited, case.carried)
    assert_measured(case, expected)
    assert_each_measure_shows(case)


@pytest.mark.parametrize("dtype", DTYPES)
def test_adds_only_gives_the_same_bits(dtype: torch.dtype) -> None:
    programs = [adds(n) for n in range(MAX_ADDS + 1)]
    case = build(programs, hidden_size=63, dtype=dtype, num_tokens=60, seed=3)
    general = edit(case)
    case.adds_only = True
    ratios = assert_matches(case, edit(case), oracle_of(case), ulps=0.5)
    assert torch.equal(edit(case), general)
    assert ratios.max() > FAR_ABOVE


def test_given_rows_give_the_same_bits() -> None:
    case = build(single_operations(), hidden_size=63, dtype=torch.bfloat16, num_tokens=30, seed=4)
    found, given_rows = case.carried.clone(), case.carried.clone()
    edit_residual_reference(case.hidden, found, case.tables, SITE, adds_only=False)
    rows_N = case.tables.slot_T[:30].nonzero().squeeze(1)
    edit_residual_reference(case.hidden, given_rows, case.tables, SITE, adds_only=False, rows_N=rows_N)
    assert torch.equal(found, given_rows)
    assert not torch.equal(found, case.carried)


def test_opposite_adds_cancel_exactly() -> None:
    steps = [Step(op="add", scale=0.3), Step(op="add", vector=1, scale=-7.0)]
    back = [Step(op="add", vector=1, scale=7.0), Step(op="add", scale=-0.3)]
    case = build(
        [Program(steps=steps[:1] + back[1:]), Program(steps=steps)],
        hidden_size=63,
        dtype=torch.float32,
        num_tokens=9,
        seed=5,
        adds_only=True,
    )
    edited = edit(case)
    assert torch.equal(edited[1::3], case.carried[1::3])
    assert not torch.equal(edited[2::3], case.carried[2::3])


def test_a_stream_of_several_sequences_is_refused() -> None:
    with pytest.raises(AssertionError, match="one row per token"):
        rows_view(torch.zeros(2, 3, 4))


def test_the_package_does_not_import_triton() -> None:
    code = "import sys, steer_kernels, steer_kernels.reference; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-P", "-c", code], check=True)
