"""`add_rms_norm_edit`: reference, interpreter and compiled code against the float64 oracle."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from helpers.cases import (
    DTYPES,
    MAX_ADDS,
    NUM_ENTRIES,
    NUM_SITES,
    SITE,
    SIZES,
    Case,
    Program,
    adds,
    batches,
    build,
    each_detail,
    each_group,
    each_measure,
    single_operations,
)
from helpers.kernel_check import FAR_ABOVE, assert_captured, assert_each_detail_shows, assert_measured, oracle_of
from helpers.kernel_oracle import rms_norm, store_error, to_float64
from helpers.kernel_process import Process
from helpers.ptx_machine import Machine, Traffic
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from steer_kernels.launch_table import LAUNCH_TABLE, MAX_NORMED_BYTES
from steer_kernels.reference import add_rms_norm_edit_reference, rows_view

from .test_compile import TARGETS
from .test_edit_residual import INTERPRETED_ULPS

EPSILON = 1e-5
Kernel = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Case], None]


def weights(case: Case) -> torch.Tensor:
    generator = torch.Generator().manual_seed(9)
    return (0.5 + torch.rand(case.carried.shape[-1], generator=generator)).to(case.carried.dtype)


def check(case: Case, kernel: Kernel, *, ulps: float) -> None:
    """Both outputs of every row are within their error bounds, and the effect of steering is far above the bounds."""
    assert case.hidden is not None
    expected = oracle_of(case)
    x_TD = expected.x_TD + expected.delta_TD
    error_TD = expected.x_error_TD + expected.error_TD
    weight_D = weights(case)
    normed_TD, normed_error_TD = rms_norm(x_TD, error_TD, to_float64(weight_D), EPSILON)
    plain_TD, _ = rms_norm(expected.x_TD, expected.x_error_TD, to_float64(weight_D), EPSILON)
    hidden, residual = case.hidden.clone(), case.carried.clone()
    kernel(hidden, residual, weight_D, case)
    decided_T = expected.decided_T
    for name, tensor, value_TD, bound_TD in (
        ("stream", residual, x_TD, error_TD),
        ("norm", hidden, normed_TD, normed_error_TD),
    ):
        allowed_TD = store_error(value_TD, bound_TD, tensor.dtype, ulps=ulps)
        wrong_TD = np.abs(to_float64(rows_view(tensor)) - value_TD) > allowed_TD
        assert not wrong_TD[decided_T].any(), f"rows {np.flatnonzero(wrong_TD.any(1))} of the {name} are wrong"
    assert_measured(case, expected)
    if case.capture:
        assert_captured(case, expected, rows_view(residual).float(), ulps=ulps)
    shown_T = expected.touched_T & decided_T
    if shown_T.any() and case.carried.shape[-1] > 1:
        effect_T = np.abs(normed_TD - plain_TD)[shown_T].max(1)
        bound_T = store_error(normed_TD, normed_error_TD, hidden.dtype, ulps=ulps)[shown_T].max(1)
        case_ratio = float((effect_T / bound_T).max())
        assert case_ratio > (FAR_ABOVE if case.adds_only else 1), "steering has no visible effect on the normed rows"


def reference(hidden: torch.Tensor, residual: torch.Tensor, weight_D: torch.Tensor, case: Case) -> None:
    add_rms_norm_edit_reference(
        *(hidden, residual, weight_D, case.tables, SITE),
        epsilon=EPSILON,
        adds_only=case.adds_only,
        capture=case.capture,
    )


def interpreted_kernel(process: Process) -> Kernel:
    def call(hidden: torch.Tensor, residual: torch.Tensor, weight_D: torch.Tensor, case: Case) -> None:
        process.call(
            "add_rms_norm_edit.add_rms_norm_edit",
            *(hidden, residual, weight_D, case.tables, SITE),
            epsilon=EPSILON,
            adds_only=case.adds_only,
            capture=case.capture,
        )

    return call


def cases(dtype: torch.dtype, hidden_size: int, num_tokens: int) -> list[Case]:
    """One case with each operation in its own slot, one case with adds only."""
    sizes = {"hidden_size": hidden_size, "dtype": dtype, "num_tokens": num_tokens}
    every = build(single_operations(), **sizes, seed=1, capture=True)  # type: ignore[arg-type]
    only_adds = build([adds(n) for n in range(MAX_ADDS + 1)], **sizes, seed=2, adds_only=True)  # type: ignore[arg-type]
    return [every, only_adds]


def detailed_cases(dtype: torch.dtype) -> Iterator[Case]:
    """Each detail in its own slot, in the general kernel and, without conditions, in the one for adds."""
    for adds_only in (False, True):
        programs = each_detail(adds_only=adds_only)
        num_tokens = 12 * (len(programs) + 1)
        case = build(programs, hidden_size=63, dtype=dtype, num_tokens=num_tokens, seed=7, adds_only=adds_only)
        assert_each_detail_shows(case, oracle_of(case))
        yield case
    yield build(each_measure(), hidden_size=63, dtype=dtype, num_tokens=60, seed=8)
    yield build(each_group(), hidden_size=63, dtype=dtype, num_tokens=54, seed=9)


@pytest.mark.parametrize("hidden_size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reference(dtype: torch.dtype, hidden_size: int) -> None:
    for case in cases(dtype, hidden_size, 36):
        check(case, reference, ulps=0.5)


@pytest.mark.parametrize("hidden_size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_interpreted(interpreted: Process, dtype: torch.dtype, hidden_size: int) -> None:
    for case in cases(dtype, hidden_size, 36 if hidden_size < 4096 else 12):
        check(case, interpreted_kernel(interpreted), ulps=INTERPRETED_ULPS[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_detail_in_the_reference(dtype: torch.dtype) -> None:
    for case in detailed_cases(dtype):
        check(case, reference, ulps=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_detail_interpreted(interpreted: Process, dtype: torch.dtype) -> None:
    for case in detailed_cases(dtype):
        check(case, interpreted_kernel(interpreted), ulps=INTERPRETED_ULPS[dtype])


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=batches,
    dtype=st.sampled_from(DTYPES),
    hidden_size=st.sampled_from([63, 576]),
    seed=st.integers(0, 2**16),
    batched=st.booleans(),
)
def test_random_mixes(
    interpreted: Process,
    batch: tuple[list[Program], bool],
    dtype: torch.dtype,
    hidden_size: int,
    seed: int,
    batched: bool,
) -> None:
    programs, adds_only = batch
    sizes = {"hidden_size": hidden_size, "dtype": dtype, "num_tokens": 12}
    case = build(programs, **sizes, seed=seed, batched=batched, adds_only=adds_only)  # type: ignore[arg-type]
    hidden, residual = (torch.empty_like(case.carried) for _ in range(2))
    for kernel, ulps in ((reference, 0.5), (interpreted_kernel(interpreted), INTERPRETED_ULPS[dtype])):
        assert case.hidden is not None
        expected = oracle_of(case)
        hidden.copy_(case.hidden)
        residual.copy_(case.carried)
        kernel(hidden, residual, weights(case), case)
        value_TD = expected.x_TD + expected.delta_TD
        bound_TD = store_error(value_TD, expected.x_error_TD + expected.error_TD, dtype, ulps=ulps)
        wrong_TD = np.abs(to_float64(rows_view(residual)) - value_TD) > bound_TD
        assert not wrong_TD[expected.decided_T].any()
        assert torch.isfinite(hidden.float()).all()
        assert_measured(case, expected)


@pytest.mark.parametrize(
    ("hidden_size", "dtype"),
    [
        (hidden_size, dtype)
        for hidden_size in LAUNCH_TABLE
        for dtype in (torch.float32, torch.bfloat16)
        if hidden_size * dtype.itemsize <= MAX_NORMED_BYTES
    ],
)
@pytest.mark.parametrize("target", TARGETS)
def test_every_launch_compiles(compiled: Process, target: str, dtype: torch.dtype, hidden_size: int) -> None:
    for adds_only, num_probes in ((True, 0), (False, 0), (False, 4)):
        artifact = compiled.call(
            *("compile.compile_add_rms_norm_edit", target, hidden_size, dtype),
            adds_only=adds_only,
            num_probes=num_probes,
        )
        assert artifact.spilled_bytes == 0
        assert {access.width for access in artifact.accesses if access.of_a_row} == {16}


def run_compiled(process: Process, target: str, case: Case) -> tuple[Kernel, list[dict[int, Traffic]]]:
    """A kernel that runs the compiled code, and the list to which it appends the traffic of each row."""
    rows: list[dict[int, Traffic]] = []

    def call(hidden: torch.Tensor, residual: torch.Tensor, weight_D: torch.Tensor, case: Case) -> None:
        tables = case.tables
        artifact = process.call(
            "compile.compile_add_rms_norm_edit",
            *(target, residual.shape[1], residual.dtype),
            adds_only=case.adds_only,
            num_sites=NUM_SITES,
            num_entries=NUM_ENTRIES,
            num_probes=0 if tables.probed_TK is None else tables.probed_TK.shape[1],
        )
        machine = Machine(
            artifact.text,
            [
                *(hidden, residual, weight_D, tables.bank_RD, tables.entries_SLEW, tables.counts_SL),
                *(tables.keep_norm_S, tables.slot_T, tables.pos_T, tables.windows_TJ),
                *(tables.measured_SQ, tables.bounds_SQ2, torch.zeros(1, dtype=torch.int32)),
                torch.zeros(1, 1, 1, dtype=residual.dtype),
                *(tables.bounds_SQ2 if tables.probed_TK is None else tables.probed_TK, SITE, EPSILON),
            ],
        )
        rows.extend(machine.run(row) for row in range(len(residual)))

    return call, rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled(compiled: Process, dtype: torch.dtype) -> None:
    case = build(single_operations(), hidden_size=576, dtype=dtype, num_tokens=12, seed=4)
    check(case, run_compiled(compiled, "sm_90", case)[0], ulps=0.5)


@pytest.mark.parametrize(("hidden_size", "dtype"), [(576, torch.bfloat16), (4096, torch.bfloat16)])
def test_an_add_costs_one_more_row(compiled: Process, hidden_size: int, dtype: torch.dtype) -> None:
    """Without steering, the minimum is three row reads (hidden, residual, weight) and two row writes."""
    case = build([adds(1)], hidden_size=hidden_size, dtype=dtype, num_tokens=4, seed=5, adds_only=True)
    kernel, rows = run_compiled(compiled, "sm_90", case)
    check(case, kernel, ulps=0.5)
    row_bytes = hidden_size * dtype.itemsize
    for row, traffic in enumerate(rows):
        moved = sum(tensor.loaded + tensor.stored for tensor in traffic.values())
        steered = int(case.tables.slot_T[row]) > 0
        assert 0 <= moved - (6 if steered else 5) * row_bytes <= (64 if steered else 4)
