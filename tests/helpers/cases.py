"""Batches to edit: random programs over a random bank, with streams whose components along the bank are large.

Legend: see `steer_kernels.tables`. Rows 0 to 3 of the bank are raw, 4 to 7 unit vectors; row 0 of no operation is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt

import numpy as np
import torch
from hypothesis import strategies as st
from steer_kernels.tables import MAX_POSITION, Entry, Tables, encode_entry

NUM_RAW = 4
NUM_ROWS = 8
NUM_SITES = 3
NUM_ENTRIES = 4
SITE = 1
MAX_POS = 40
OPS = ("add", "add_relative", "ablate", "clamp", "set")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SIZES = (1, 63, 576, 4096, 16384)


@dataclass(frozen=True, kw_only=True)
class Step:
    """An operation as DESIGN's table of operations has it, in numbers that don't depend on D."""

    op: str
    vector: int = 0
    scale: float = 1.0
    """add: of the raw row; add_relative and ablate: 1 = the whole norm or component."""
    bounds: tuple[float, float] = (0.0, 0.0)
    """clamp and set: of the component, in units of sqrt(D)."""
    span: tuple[int, int] = (0, MAX_POSITION)
    gate: tuple[int, float, float] | None = None
    """vector, min_cos, max_cos."""

    def entry(self, hidden_size: int) -> Entry:
        start, end = self.span
        unit = NUM_RAW + self.vector
        lo, hi = (sqrt(hidden_size) * bound for bound in self.bounds)
        gate_row, min_cos, max_cos = self.gate or (-1, -np.inf, np.inf)
        coefficients: dict[str, dict[str, float]] = {
            "add": {"c0": self.scale},
            "add_relative": {"c1": self.scale},
            "ablate": {"c2": -self.scale},
            "clamp": {"c3": 1.0, "lo": lo, "hi": hi},
            "set": {"c3": 1.0, "lo": lo, "hi": lo},
        }
        row = self.vector if self.op == "add" else unit
        gate = {"gate_row": gate_row, "min_cos": min_cos, "max_cos": max_cos}
        return Entry(row=row, start=start, end=end, **coefficients[self.op], **gate)  # type: ignore[arg-type]


@dataclass(frozen=True, kw_only=True)
class Program:
    steps: Sequence[Step]
    keep_norm: bool = False


@dataclass(kw_only=True)
class Case:
    hidden: torch.Tensor | None
    carried: torch.Tensor
    tables: Tables
    adds_only: bool
    capture: bool

    def clone_carried(self) -> torch.Tensor:
        return self.carried.clone()


def build(
    programs: Sequence[Program],
    *,
    hidden_size: int,
    dtype: torch.dtype,
    num_tokens: int,
    seed: int,
    bank_dtype: torch.dtype | None = None,
    split: bool = True,
    batched: bool = False,
    adds_only: bool = False,
    capture: bool = False,
) -> Case:
    """Rows are dealt to slots 0 (unsteered), 1, ... in turn, at positions that walk through 0 to MAX_POS - 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    tables = Tables.allocate(
        num_slots=len(programs) + 1,
        num_sites=NUM_SITES,
        num_entries=NUM_ENTRIES,
        num_rows=NUM_ROWS,
        hidden_size=hidden_size,
        max_tokens=num_tokens + 3,
        bank_dtype=bank_dtype or dtype,
        capture_rows=num_tokens if capture else 0,
        capture_dtype=torch.float32,
    )
    bank_RD = normal(NUM_ROWS, hidden_size)
    bank_RD[NUM_RAW:] /= bank_RD[NUM_RAW:].norm(dim=1, keepdim=True)
    tables.bank_RD.copy_(bank_RD)
    for slot, program in enumerate(programs, start=1):
        for e, step in enumerate(program.steps):
            tables.entries_SLEW[slot, SITE, e] = torch.from_numpy(encode_entry(step.entry(hidden_size)))
        tables.counts_SL[slot, SITE] = len(program.steps)
        tables.keep_norm_S[slot] = int(program.keep_norm)
    # What must never be read: a program in slot 0, entries beyond the count, and other sites.
    trap = torch.from_numpy(encode_entry(Entry(row=0, c0=1e4)))
    tables.entries_SLEW[0] = trap
    tables.counts_SL[0] = NUM_ENTRIES
    tables.keep_norm_S[0] = 1
    for slot in range(1, len(programs) + 1):
        tables.entries_SLEW[slot, SITE, int(tables.counts_SL[slot, SITE]) :] = trap
        tables.entries_SLEW[slot, SITE + 1 :] = trap
        tables.counts_SL[slot, SITE + 1 :] = NUM_ENTRIES
    rows = torch.arange(num_tokens, dtype=torch.int32)
    tables.slot_T[:num_tokens] = rows % (len(programs) + 1)
    tables.pos_T[:num_tokens] = torch.where(tables.slot_T[:num_tokens] > 0, (rows * 7) % MAX_POS, 0)
    tables.slot_T[num_tokens:] = 1
    if tables.capture_T is not None:
        places = torch.where(rows % 3 == 1, num_tokens - rows, 0)
        # Every other one of them as the edit leaves it.
        tables.capture_T[:num_tokens] = torch.where(rows // 3 % 2 == 1, -places, places)

    # A row's largest component, 6 to 8 standard deviations of the noise, is along the first vector of its own program:
    # removing or holding it is a change as large as the row.
    shape = (num_tokens, NUM_ROWS - NUM_RAW)
    weights = torch.rand(shape, generator=generator) - 0.5
    largest = (3 + torch.rand(num_tokens, generator=generator)) * normal(num_tokens).sign()
    for t in range(num_tokens):
        slot = int(tables.slot_T[t])
        if slot and programs[slot - 1].steps:
            weights[t, programs[slot - 1].steps[0].vector] = largest[t]
    stream_TD = weights @ bank_RD[NUM_RAW:] * sqrt(hidden_size)
    carried = (stream_TD + 0.5 * normal(num_tokens, hidden_size)).to(dtype)
    hidden = (0.5 * normal(num_tokens, hidden_size)).to(dtype) if split else None
    if batched:
        carried, hidden = carried[None], hidden if hidden is None else hidden[None]
    return Case(hidden=hidden, carried=carried, tables=tables, adds_only=adds_only, capture=capture)


def single_operations() -> list[Program]:
    """Each operation alone, with a scale at which it changes every row by its own size."""
    steps = [
        Step(op="add", scale=8.0),
        Step(op="add_relative", vector=1, scale=-2.0),
        Step(op="ablate", vector=0, scale=1.0),
        Step(op="clamp", vector=1, bounds=(-0.25, 0.5)),
        Step(op="set", vector=2, bounds=(6.0, 6.0)),
    ]
    return [Program(steps=[step]) for step in steps]


def adds(num: int) -> Program:
    """`num` adds of different rows, the last two of limited range, which end and begin at the same position."""
    spans = [(0, MAX_POSITION), (0, MAX_POSITION), (0, MAX_POS // 2), (MAX_POS // 2, MAX_POSITION)]
    return Program(steps=[Step(op="add", vector=i, scale=4.0 - 3 * i, span=spans[i]) for i in range(num)])


scales = st.sampled_from([-4.0, -1.0, -0.5, 0.0, 0.3, 1.0, 2.0, 8.0])
vectors = st.integers(0, NUM_RAW - 1)
positions = st.integers(0, MAX_POS)


@st.composite
def steps(draw: st.DrawFn) -> Step:
    """One operation with a range and, one time in three, a gate."""
    low = draw(st.sampled_from([-3.0, -1.0, 0.0, 0.5]))
    start = draw(st.one_of(st.just(0), positions))
    end = draw(st.one_of(st.just(MAX_POSITION), positions))
    threshold = draw(st.sampled_from([-0.5, -0.1, 0.0, 0.1, 0.5]))
    bounds = draw(st.sampled_from([(threshold, np.inf), (-np.inf, threshold), (-0.6, 0.6)]))
    gate = (draw(st.integers(0, NUM_ROWS - 1)), *bounds) if draw(st.integers(0, 2)) == 0 else None
    return Step(
        op=draw(st.sampled_from(OPS)),
        vector=draw(vectors),
        scale=draw(scales),
        bounds=(low, low + draw(st.sampled_from([0.0, 0.5, 4.0]))),
        span=(start, end),
        gate=gate,
    )


@st.composite
def mixes(draw: st.DrawFn) -> list[Program]:
    """One to five programs of 0 to 4 steps in random order."""
    program = st.builds(Program, steps=st.lists(steps(), max_size=NUM_ENTRIES), keep_norm=st.booleans())
    return draw(st.lists(program, min_size=1, max_size=5))
