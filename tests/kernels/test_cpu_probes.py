"""The plan of a step with probes: bit for bit what the reference computes, and nothing at sites without probes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from helpers.cases import (
    DTYPES,
    NUM_SITES,
    SITE,
    Case,
    Program,
    Step,
    adds,
    build,
    each_probe,
    probed_mixes,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from steer_kernels.cpu_full_edits import take_full
from steer_kernels.cpu_plan import StepPlan
from steer_kernels.cpu_probes import take_probes
from steer_kernels.reference import edit_residual_reference
from steer_kernels.tables import COSINE, DOT, GATE_ROW, Entry, encode_entry


def planned(programs: list[Program]) -> list[Program]:
    """What a plan supports: no measuring for conditions, and the probes around the edits, as the compiler has them."""

    def turn(step: Step) -> int:
        return 1 if step.probe is None else 2 * step.probe[2]

    plain = [[step for step in program.steps if step.measure is None] for program in programs]
    return [replace(program, steps=sorted(steps, key=turn)) for program, steps in zip(programs, plain, strict=True)]


def case_of(programs: list[Program], **options: object) -> Case:
    case = build(planned(programs), probes=True, **options)  # type: ignore[arg-type]
    for slot in range(1, len(programs) + 1):  # a plan reads entries beyond the count, which the engine clears
        case.tables.entries_SLEW[slot, SITE, int(case.tables.counts_SL[slot, SITE]) :] = 0
    return case


def plan_of(case: Case) -> StepPlan:
    num_tokens = case.carried.shape[-2]
    slot_T, pos_T = case.tables.slot_T[:num_tokens], case.tables.pos_T[:num_tokens]
    starts = torch.arange(num_tokens + 1, dtype=torch.int32)
    return StepPlan.of_step(case.tables, slot_T.nonzero().squeeze(1), starts, slot_T - 1, pos_T.long())


def check(case: Case) -> tuple[StepPlan, torch.Tensor]:
    """Plan and reference leave the same bits at every site. Returns the plan, and the numbers at SITE."""
    probed_TK = case.tables.probed_TK
    assert probed_TK is not None
    plan = plan_of(case)
    for site in range(NUM_SITES):
        by_plan, by_reference = case.carried.clone(), case.carried.clone()
        plan.apply(case.hidden, by_plan, case.tables.bank_RD, site)
        actual_TK = probed_TK.clone()
        probed_TK.fill_(torch.nan)
        edit_residual_reference(case.hidden, by_reference, case.tables, site, adds_only=False)
        assert torch.equal(by_plan, by_reference)
        assert torch.equal(actual_TK.nan_to_num(1e30), probed_TK.nan_to_num(1e30))
        if site == SITE:
            result_TK = actual_TK
        probed_TK.fill_(torch.nan)
    return plan, result_TK


@settings(deadline=None, max_examples=60)
@given(
    programs=probed_mixes,
    dtype=st.sampled_from(DTYPES),
    hidden_size=st.sampled_from([1, 63, 576]),
    seed=st.integers(0, 2**16),
    split=st.booleans(),
    batched=st.booleans(),
)
def test_random_mixes(
    programs: list[Program], dtype: torch.dtype, hidden_size: int, seed: int, split: bool, batched: bool
) -> None:
    check(
        case_of(programs, dtype=dtype, hidden_size=hidden_size, seed=seed, num_tokens=18, split=split, batched=batched)
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_probe(dtype: torch.dtype) -> None:
    programs = each_probe()
    case = case_of(programs, hidden_size=4096, dtype=dtype, num_tokens=5 * (len(programs) + 1), seed=1)
    plan, number_TK = check(case)
    assert number_TK.isfinite().any(0).tolist() == [True, False, True, True, True, False]
    assert list(plan.probes) == [SITE]


def test_a_row_does_not_depend_on_the_others() -> None:
    """Alone, a row has the numbers that it has in a batch large enough for several groups of pairs."""
    programs = each_probe()[:3]
    case = case_of(programs, hidden_size=16384, dtype=torch.float32, num_tokens=40, seed=2)
    _, together_TK = check(case)
    slot_T = case.tables.slot_T.clone()
    for row in (1, 2, 3, 37, 38, 39):
        case.tables.slot_T.zero_()
        case.tables.slot_T[row] = slot_T[row]
        if slot_T[row]:
            _, alone_TK = check(case)
            assert torch.equal(alone_TK[row].nan_to_num(1e30), together_TK[row].nan_to_num(1e30))


def test_only_probes_edit_nothing() -> None:
    probes = [Step(op="ablate", probe=(kind, kind, late)) for kind, late in ((DOT, False), (COSINE, True))]
    case = case_of([Program(steps=probes)], hidden_size=63, dtype=torch.bfloat16, num_tokens=8, seed=3)
    case.tables.counts_SL[:, SITE + 1 :] = 0
    case.tables.entries_SLEW[:, SITE + 1 :] = 0
    plan, number_TK = check(case)
    assert not plan.place_of
    assert not plan.full
    assert plan.decoding is not None
    carried = case.carried.clone()
    plan.apply(case.hidden, carried, case.tables.bank_RD, SITE)
    assert torch.equal(carried, case.carried)
    assert number_TK[1:8:2, [DOT, COSINE]].isfinite().all()


def test_probes_take_no_place_among_the_edits() -> None:
    """So the edits of other sites cost what they cost without probes."""
    probes = [Step(op="ablate", probe=(DOT, column, False)) for column in range(3)]
    case = case_of(
        [Program(steps=[*probes, *adds(1).steps]), Program(steps=[*probes, Step(op="ablate")])],
        hidden_size=63,
        dtype=torch.float32,
        num_tokens=9,
        seed=4,
    )
    case.tables.counts_SL[:, SITE + 1 :] = 0
    case.tables.entries_SLEW[:, SITE + 1 :] = 0
    plan, _ = check(case)
    assert list(plan.probes) == [SITE]
    words_NLEW = case.tables.entries_SLEW[1:]
    _, left_NLEW, share_NLE = take_probes(case.tables, words_NLEW, torch.ones(words_NLEW.shape[:3]), torch.arange(2))
    assert left_NLEW.shape[:3] == share_NLE.shape == (2, NUM_SITES, 1)
    assert torch.equal(left_NLEW[:, SITE, 0], words_NLEW[:, SITE, 3])


def test_a_probe_that_was_taken_out_is_no_gate() -> None:
    """A row with fewer entries than another keeps words of its probes, whose column is where a gate has its row."""
    probe = encode_entry(Entry(row=1, measure=DOT, probe=1000))
    gated = encode_entry(Entry(row=2, c0=1.0, gate_row=3))
    words_NLEW = torch.from_numpy(np.stack([[[gated, probe]], [[gated, gated]]]))
    share_NLE = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])
    rows_N, keep_norm_N = torch.arange(2), torch.zeros(2, dtype=torch.int32)
    full, left_NLE = take_full(words_NLEW, share_NLE, rows_N, keep_norm_N)
    assert full is not None
    assert full[0].words_MEW[..., GATE_ROW].tolist() == [[3, -1], [3, 3]]
    assert not left_NLE.any()
    words_NLEW[:] = torch.from_numpy(probe)
    full, left_NLE = take_full(words_NLEW, torch.zeros(2, 1, 2), rows_N, keep_norm_N)
    assert full is None
