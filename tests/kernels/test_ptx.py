"""Compiled kernels run by a PTX emulator: values against the oracle, bytes moved against the minimum.

Unlike the interpreter, this runs the code that a GPU would run, so bfloat16 rounds as on hardware.
"""

from __future__ import annotations

import pytest
import torch
from helpers.cases import (
    DTYPES,
    MAX_ADDS,
    NUM_ENTRIES,
    NUM_SITES,
    SITE,
    Case,
    Program,
    Step,
    adds,
    build,
    each_detail,
    each_group,
    each_measure,
    each_probe,
    grouped,
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
from helpers.ptx_machine import Machine, Traffic
from steer_kernels.reference import edit_residual_reference

from .test_compile import SCALAR_BYTES

TARGETS = ("sm_80", "sm_90", "sm_100")


def machine_of(process: Process, target: str, case: Case, carried: torch.Tensor) -> Machine:
    """The compiled kernel of a launch on `case`, with its tensors as arguments."""
    tables = case.tables
    captured_CD = tables.captured_at(SITE) if case.capture else torch.zeros(1, 1, dtype=carried.dtype)
    capture_T = tables.capture_T if case.capture else torch.zeros(1, dtype=torch.int32)
    assert captured_CD is not None
    assert capture_T is not None
    artifact = process.call(
        "compile.compile_edit_residual",
        *(target, carried.shape[1], carried.dtype),
        adds_only=case.adds_only,
        capture=case.capture,
        has_hidden=case.hidden is not None,
        bank_dtype=tables.bank_RD.dtype,
        num_sites=NUM_SITES,
        num_entries=NUM_ENTRIES,
        num_probes=0 if tables.probed_TK is None else tables.probed_TK.shape[1],
    )
    hidden = torch.zeros(1, 1, dtype=carried.dtype) if case.hidden is None else case.hidden
    arguments = (hidden, carried, tables.bank_RD, tables.entries_SLEW, tables.counts_SL, tables.keep_norm_S)
    when = (tables.slot_T, tables.pos_T, tables.windows_TJ, tables.measured_SQ, tables.bounds_SQ2)
    probed_TK = tables.bounds_SQ2 if tables.probed_TK is None else tables.probed_TK
    return Machine(artifact.text, [*arguments, *when, capture_T, captured_CD, probed_TK, SITE])


def run(process: Process, target: str, case: Case) -> tuple[torch.Tensor, list[dict[int, Traffic]]]:
    """The edited stream, and for each row the traffic by tensor address."""
    carried = case.carried.clone()
    machine = machine_of(process, target, case, carried)
    return carried, [machine.run(row) for row in range(len(carried))]


@pytest.mark.parametrize("hidden_size", [63, 576])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_adds_equal_the_reference_bit_for_bit(
    compiled: Process, target: str, dtype: torch.dtype, hidden_size: int
) -> None:
    programs = [adds(n) for n in range(MAX_ADDS + 1)]
    case = build(programs, hidden_size=hidden_size, dtype=dtype, num_tokens=12, seed=1, adds_only=True)
    edited, _ = run(compiled, target, case)
    assert assert_matches(case, edited, oracle_of(case), ulps=0.5).max() > FAR_ABOVE
    reference = case.carried.clone()
    edit_residual_reference(case.hidden, reference, case.tables, SITE, adds_only=True)
    assert torch.equal(edited, reference)


@pytest.mark.parametrize(
    ("hidden_size", "dtype"), [*((576, dtype) for dtype in DTYPES), (4096, torch.bfloat16), (16384, torch.bfloat16)]
)
def test_every_operation(compiled: Process, hidden_size: int, dtype: torch.dtype) -> None:
    """Each operation alone, and a mix with a gate and a preserved norm. Rows are captured too."""
    mix = [Step(op="ablate", gate=(5, -2.0, 0.0)), Step(op="add", scale=2.0), Step(op="set", bounds=(1.0, 1.0))]
    case = build(
        [*single_operations(), Program(steps=mix, keep_norm=True)],
        hidden_size=hidden_size,
        dtype=dtype,
        num_tokens=14 if hidden_size < 16384 else 7,
        seed=3,
        capture=True,
    )
    edited, _ = run(compiled, "sm_90", case)
    assert assert_matches(case, edited, oracle_of(case), ulps=0.5).min() > 1


@pytest.mark.parametrize(
    ("hidden_size", "dtype"), [(63, torch.float32), (576, torch.float16), (576, torch.bfloat16), (16384, torch.float32)]
)
@pytest.mark.parametrize("target", TARGETS)
def test_groups(compiled: Process, target: str, dtype: torch.dtype, hidden_size: int) -> None:
    case = build(each_group(), hidden_size=hidden_size, dtype=dtype, num_tokens=9 if hidden_size > 576 else 27, seed=9)
    expected = oracle_of(case)
    edited, _ = run(compiled, target, case)
    assert assert_matches(case, edited, expected, ulps=0.5).max() > FAR_ABOVE
    if hidden_size <= 576:
        assert_groups_show(case, expected)


@pytest.mark.parametrize("adds_only", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_every_detail(compiled: Process, target: str, dtype: torch.dtype, adds_only: bool) -> None:
    programs = each_detail(adds_only=adds_only)
    num_tokens = 6 * (len(programs) + 1)
    case = build(programs, hidden_size=63, dtype=dtype, num_tokens=num_tokens, seed=7, adds_only=adds_only)
    expected = oracle_of(case)
    edited, _ = run(compiled, target, case)
    assert assert_matches(case, edited, expected, ulps=0.5).max() > FAR_ABOVE
    assert_each_detail_shows(case, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_what_entries_measure(compiled: Process, target: str, dtype: torch.dtype) -> None:
    case = build(each_measure(), hidden_size=576, dtype=dtype, num_tokens=20, seed=8)
    case.tables.measured_SQ[:] = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf, 0.0, 0.0, 0.0, 0.0])
    expected = oracle_of(case)
    edited, rows = run(compiled, target, case)
    assert torch.equal(edited, case.carried)
    assert sum(tensor.stored for traffic in rows for tensor in traffic.values()) == 0
    assert_measured(case, expected)
    assert_each_measure_shows(case)


@pytest.mark.parametrize(("adds_only", "probes"), [(True, False), (False, False), (False, True)])
@pytest.mark.parametrize(
    ("hidden_size", "dtype"), [(576, torch.bfloat16), (4096, torch.bfloat16), (576, torch.float32)]
)
@pytest.mark.parametrize("target", TARGETS)
def test_an_add_moves_the_minimum(
    compiled: Process, target: str, hidden_size: int, dtype: torch.dtype, adds_only: bool, probes: bool
) -> None:
    """In the general kernel too: it loads only what the entry needs, and no details of an entry that has none. With a
    buffer for probes, a request without them moves no more.

    Besides rows: slot, count, position and the entry's first 16 bytes; in the general kernel also its gate row, three
    coefficients and whether the norm is kept.
    """
    case = build(
        [adds(1)], hidden_size=hidden_size, dtype=dtype, num_tokens=4, seed=4, adds_only=adds_only, probes=probes
    )
    _, rows = run(compiled, target, case)
    floor = 3 * hidden_size * dtype.itemsize
    bank = case.tables.bank_RD.data_ptr()
    for row, traffic in enumerate(rows):
        moved = sum(tensor.loaded + tensor.stored for tensor in traffic.values())
        if case.tables.slot_T[row] == 0:
            assert moved == 4, "an unsteered row loads only the 4 bytes of its slot"
        else:
            assert moved == floor + SCALAR_BYTES + (0 if adds_only else 5 * 4)
            assert traffic[bank].loaded == floor // 3
            assert traffic[bank].widths == {16}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("target", TARGETS)
def test_probes(compiled: Process, target: str, dtype: torch.dtype) -> None:
    """The numbers, and that a row with nothing but probes stores only 4 bytes for each of them."""
    programs = each_probe()
    case = build(programs, hidden_size=576, dtype=dtype, num_tokens=2 * (len(programs) + 1), seed=8, probes=True)
    expected = oracle_of(case)
    edited, rows = run(compiled, target, case)
    assert_matches(case, edited, expected, ulps=0.5)
    only_T = torch.isin(case.tables.slot_T[: len(rows)], torch.tensor([1, 5], dtype=torch.int32))
    for row in only_T.nonzero().squeeze(1).tolist():
        assert sum(tensor.stored for tensor in rows[row].values()) == 2 * 4


def test_rows_outside_all_spans_are_not_written(compiled: Process) -> None:
    case = build([Program(steps=[Step(op="add", span=(50, 60))])], hidden_size=576, dtype=torch.bfloat16,
                 num_tokens=2, seed=5)  # fmt: skip
    edited, rows = run(compiled, "sm_80", case)
    assert torch.equal(edited, case.carried)
    assert sum(tensor.stored for traffic in rows for tensor in traffic.values()) == 0
    assert case.tables.bank_RD.data_ptr() not in rows[1]


@pytest.mark.parametrize(
    ("program", "num_rows"),
    [
        (Program(steps=[Step(op="add")]), 3),
        (adds(2), 4),
        (Program(steps=[Step(op="add_relative")]), 5),
        (Program(steps=[Step(op="ablate")]), 5),
        (Program(steps=[Step(op="clamp", bounds=(-0.1, 0.1))]), 5),
        (Program(steps=[Step(op="set", bounds=(1.0, 1.0))]), 5),
        (Program(steps=[Step(op="add", gate=(4, -2.0, 2.0))]), 6),
        (Program(steps=[Step(op="add")], keep_norm=True), 7),
        (Program(steps=[Step(op="feature", bounds=(-99.0, 1.0))]), 6),
        (Program(steps=[Step(op="feature", bounds=(99.0, 1.0))]), 5),
        (Program(steps=[Step(op="low_rank")]), 6),
        (Program(steps=grouped(Step(op="add"), [Step(op="low_rank", vector=v) for v in range(4)])), 18),
        (Program(steps=grouped(Step(op="add"), [Step(op="turn", vector=0), Step(op="turn", vector=1)])), 16),
    ],
    ids=[
        "add",
        "two adds",
        "add_relative",
        "ablate",
        "clamp",
        "set",
        "gated add",
        "norm preserved",
        "feature",
        "inactive feature",
        "rank 1",
        "rank 4",
        "rotate",
    ],
)
def test_rows_moved_by_each_operation(compiled: Process, program: Program, num_rows: int) -> None:
    """The table of docs/cost_model.md: rows of D items loaded and stored per token, including repeats from cache."""
    case = build([program], hidden_size=4096, dtype=torch.bfloat16, num_tokens=2, seed=6)
    edited, rows = run(compiled, "sm_90", case)
    inactive = program.steps[0].op == "feature" and program.steps[0].bounds[0] > 0
    assert torch.equal(edited[1], case.carried[1]) == inactive
    moved = sum(tensor.loaded + tensor.stored for tensor in rows[1].values())
    assert 0 < moved - num_rows * 4096 * 2 <= 128 * len(program.steps)
