"""Batches to edit: random programs over a random bank, with streams whose components along the bank are large.

Legend: see `steer_kernels.tables`. Rows 0 to 3 of the bank are raw, 4 to 7 unit vectors; row 0 of no operation is free.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import cos, inf, log2, radians, sin, sqrt

import numpy as np
import torch
from hypothesis import strategies as st
from steer_kernels.tables import (
    COSINE,
    DOT,
    JUMP,
    LAST,
    MAX_CONDITIONS,
    MAX_POSITION,
    MAX_TRIGGERS,
    MEMBER,
    PLANE,
    READ,
    Entry,
    Tables,
    encode_entry,
)

NUM_RAW = 4
NUM_ROWS = 8
NUM_SITES = 3
NUM_ENTRIES = 10
MAX_ADDS = 4
NUM_PROBES = 6
SITE = 1
MAX_POS = 40
READING = ("feature", "low_rank", "turn", "turn_to")
"""Operations whose entries have a mode."""
OPS = ("add", "add_relative", "ablate", "clamp", "set", *READING)
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
    gate_dot: bool = False
    """The gate tests the dot product; its bounds are in units of sqrt(D)."""
    parallel: int = 0
    """MEMBER or LAST of a group; READING operations only."""
    trigger: int = -1
    exclude: int = -1
    conditions: int = 0
    any_condition: bool = False
    schedule: tuple[int, float, bool] | None = None
    """Tokens, the share at their end, and whether it gets there exponentially."""
    measure: tuple[int, int, bool] | None = None
    """DOT or COSINE of the unit row, the condition that counts it, and whether it keeps the largest."""
    probe: tuple[int, int, bool] | None = None
    """DOT or COSINE of the unit row, the column that it is written to, and whether it is late."""

    def entry(self, hidden_size: int) -> Entry:
        start, end = self.span
        unit = NUM_RAW + self.vector
        lo, hi = (sqrt(hidden_size) * bound for bound in self.bounds)
        gate_row, min_cos, max_cos = self.gate or (-1, -inf, inf)
        if self.gate_dot:
            min_cos, max_cos = sqrt(hidden_size) * min_cos, sqrt(hidden_size) * max_cos
        angle = radians(90 * self.scale)
        pair = {"mode": PLANE, "read_row": NUM_RAW + (self.vector ^ 1)}
        other = NUM_RAW + (self.vector + 1) % NUM_RAW
        coefficients: dict[str, dict[str, float]] = {
            "add": {"c0": self.scale},
            "add_relative": {"c1": self.scale},
            "ablate": {"c2": -self.scale},
            "clamp": {"c3": 1.0, "lo": lo, "hi": hi},
            "set": {"c3": 1.0, "lo": lo, "hi": lo},
            # Moves what is above lo to hi, by another row; nothing is moved where x is below lo.
            "feature": {"mode": JUMP, "read_row": unit, "row": other, "c2": -1.0, "c3": hi, "lo": lo, "hi": inf},
            "low_rank": {"mode": READ, "read_row": unit, "row": other, "c0": lo, "c2": self.scale, "c3": 0.5, "hi": hi},
            "turn": {**pair, "c2": cos(angle) - 1, "c3": sin(angle) * (-1) ** self.vector},
            "turn_to": {**pair, "c0": cos(angle), "c2": -1.0},
        }
        fields = {"row": self.vector if self.op == "add" else unit, "start": start, "end": end} | coefficients[self.op]
        fields |= {"gate_row": gate_row, "min_cos": min_cos, "max_cos": max_cos, "gate_dot": self.gate_dot}
        return Entry(**fields, **self._details(), parallel=self.parallel)  # type: ignore[arg-type]

    def _details(self) -> dict[str, float]:
        over, to, exponential = self.schedule or (0, 0.0, False)
        slope = (log2(to) if exponential else to - 1.0) / over if over else 0.0
        measure, total, largest = self.measure or (0, 0, False)
        probe, late = -1, False
        if self.probe is not None:
            measure, probe, late = self.probe
        return {
            "trigger": self.trigger, "exclude": self.exclude,
            "conditions": self.conditions, "any_condition": self.any_condition,
            "over": over, "slope": slope, "to": to, "exponential": exponential,
            "measure": measure, "total": total, "largest": largest, "probe": probe, "late": late,
        }  # fmt: skip


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
    probes: bool = False,
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
        num_probes=NUM_PROBES if probes else 0,
    )
    if tables.probed_TK is not None:
        tables.probed_TK.fill_(np.nan)
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
    _decide(tables, generator)
    if batched:
        carried, hidden = carried[None], hidden if hidden is None else hidden[None]
    return Case(hidden=hidden, carried=carried, tables=tables, adds_only=adds_only, capture=capture)


def _decide(tables: Tables, generator: torch.Generator) -> None:
    """Half of the rows are in a window of each trigger; conditions hold or not, as HOLDS says."""
    first_TJ = (torch.rand(tables.windows_TJ.shape, generator=generator) * (tables.pos_T[:, None] + 1)).int()
    inside_TJ = torch.rand(tables.windows_TJ.shape, generator=generator) < 0.5
    tables.windows_TJ.copy_(torch.where(inside_TJ, first_TJ, MAX_POSITION))
    number_SQ = torch.randn(tables.measured_SQ.shape, generator=generator, dtype=torch.float64)
    tables.measured_SQ.copy_(number_SQ)
    low_Q = torch.tensor([-1, 1, -inf, 0, -1, -inf, -inf, -1], dtype=torch.float64)
    high_Q = torch.tensor([inf, inf, 1, inf, 1, 0, -1, inf], dtype=torch.float64)
    tables.bounds_SQ2.copy_(torch.stack([number_SQ + low_Q, number_SQ + high_Q], dim=-1))


HOLDS = (True, False, True, False, True, False, False, True)
"""By condition. Numbers 3 and 5 are equal to a bound, which does not hold."""


def each_detail(*, adds_only: bool = False) -> list[Program]:
    """Each detail alone and several together, on an add that changes a row by its own size.

    Then a schedule on each other operation.
    """
    plain = [
        {"trigger": 0},
        {"exclude": MAX_TRIGGERS - 1},
        {"trigger": 1, "exclude": 2},
        {"schedule": (30, 0.25, False)},
        {"schedule": (30, 0.25, True)},
        {"schedule": (3, 0.0, False)},
        {"trigger": 3, "schedule": (9, 2.0, True), "span": (2, MAX_POS - 2)},
    ]
    decided = [
        {"conditions": 0b1001_0101},
        {"conditions": 0b1001_0111},
        {"conditions": 0b0000_1000},
        {"conditions": 0b0010_0000},
        {"conditions": 0b0111_0010, "any_condition": True},
        {"conditions": 0b0110_1010, "any_condition": True},
        {"trigger": 7, "conditions": 0b0000_0100, "schedule": (20, 0.5, False)},
    ]
    adding = plain if adds_only else plain + decided
    steps = [Step(op="add", scale=8.0, **step) for step in adding]  # type: ignore[arg-type]
    others = [] if adds_only else [program.steps[0] for program in single_operations()[1:8]]
    return [
        Program(steps=[step]) for step in (*steps, *(replace(step, schedule=(MAX_POS, 0.1, False)) for step in others))
    ]


def each_measure() -> list[Program]:
    """The sum and the largest of dot products and cosines: 0 to 3, in this order, are the conditions that count them.

    The slots take turns with two programs, whose second entry measures another row.
    """
    kinds = [(DOT, 0, False), (COSINE, 1, False), (DOT, 2, True), (COSINE, 3, True)]
    half = (0, MAX_POS // 2)
    return [
        Program(
            steps=[
                Step(op="ablate", vector=vector, measure=kind, span=half if vector else (0, MAX_POSITION))
                for vector, kind in enumerate(chosen)
            ]
        )
        for chosen in (kinds[:2], kinds[2:], kinds[:1], kinds[3:])
    ]


def each_probe() -> list[Program]:
    """Dot products and cosines before and after edits, in spans and windows, and alone. Columns 1 and 5 stay empty."""
    dot, cosine, late_dot, late_cosine = (
        Step(op="ablate", vector=vector, probe=(kind, column, late))
        for vector, (kind, column, late) in enumerate(
            [(DOT, 0, False), (COSINE, 2, False), (DOT, 3, True), (COSINE, 4, True)]
        )
    )
    add, ablate = Step(op="add", scale=8.0), Step(op="ablate", vector=2)
    return [
        Program(steps=[dot, cosine]),
        Program(steps=[replace(cosine, vector=0), late_cosine, add, ablate]),
        Program(steps=[dot, replace(late_dot, vector=0), ablate, add]),
        Program(steps=[replace(late_dot, vector=0), add, replace(late_cosine, vector=0, span=(0, 20))], keep_norm=True),
        Program(steps=[late_dot, replace(late_cosine, vector=2)]),
        Program(steps=[dot, replace(add, gate=(4, 0.0, inf)), replace(late_dot, vector=0), ablate]),
        Program(steps=[add, replace(dot, vector=0), replace(cosine, vector=0), replace(ablate, span=(0, 20))]),
        # An entry that measures for a condition, beside probes of the same vector.
        Program(steps=[Step(op="ablate", measure=(DOT, 7, False)), dot, replace(cosine, vector=0), add]),
        *(
            Program(steps=[replace(dot, **limit), replace(late_cosine, **limit), add])  # type: ignore[arg-type]
            for limit in PROBE_LIMITS
        ),
        adds(2),
    ]


PROBE_LIMITS: list[dict[str, object]] = [
    {"span": (5, 25)},
    {"trigger": 0},
    {"exclude": MAX_TRIGGERS - 1},
    {"trigger": 1, "exclude": 2, "span": (3, MAX_POS - 3)},
    {"schedule": (20, 0.0, False)},
    {"schedule": (20, 0.25, True)},
    {"conditions": 0b0000_0001},
    {"conditions": 0b0000_0010},
]
"""What limits the rows of a probe. A schedule matters only where its share is 0."""


def single_operations() -> list[Program]:
    """Each operation alone, with a scale at which it changes every row by its own size."""
    steps = [
        Step(op="add", scale=8.0),
        Step(op="add_relative", vector=1, scale=-2.0),
        Step(op="ablate", vector=0, scale=1.0),
        Step(op="clamp", vector=1, bounds=(-0.25, 0.5)),
        Step(op="set", vector=2, bounds=(6.0, 6.0)),
        Step(op="feature", vector=0, bounds=(-8.0, 1.0)),
        Step(op="low_rank", vector=1, bounds=(0.5, 1.0)),
        Step(op="turn", vector=2, scale=1.5),
        Step(op="turn_to", vector=3, scale=0.5),
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
def steps(draw: st.DrawFn, ops: Sequence[str] = OPS, conditions: int = 0) -> Step:
    """One operation with a range and, one time in three, a gate; half of them have details.

    ops: without others than "add", there is no gate. conditions: those that the step may ask.
    """
    low = draw(st.sampled_from([-3.0, -1.0, 0.0, 0.5]))
    start = draw(st.one_of(st.just(0), positions))
    end = draw(st.one_of(st.just(MAX_POSITION), positions))
    threshold = draw(st.sampled_from([-0.5, -0.1, 0.0, 0.1, 0.5]))
    bounds = draw(st.sampled_from([(threshold, inf), (-inf, threshold), (-0.6, 0.6)]))
    gated = len(ops) > 1 and draw(st.integers(0, 2)) == 0
    details = {}
    if draw(st.booleans()):
        details = draw(
            st.fixed_dictionaries(
                {},
                optional={"trigger": triggers, "exclude": triggers, "schedule": schedules}
                | ({"conditions": asked(conditions), "any_condition": st.booleans()} if conditions else {}),
            )
        )
    return Step(
        op=draw(st.sampled_from(ops)),
        vector=draw(vectors),
        scale=draw(scales),
        bounds=(low, low + draw(st.sampled_from([0.0, 0.5, 4.0]))),
        span=(start, end),
        gate=(draw(st.integers(0, NUM_ROWS - 1)), *bounds) if gated else None,
        gate_dot=gated and draw(st.booleans()),
        **details,  # type: ignore[arg-type]
    )


triggers = st.integers(-1, MAX_TRIGGERS - 1)
schedules = st.tuples(st.integers(1, MAX_POS), st.sampled_from([0.25, 0.5, 2.0]), st.booleans()) | st.just(
    (5, 0.0, False)
)


def asked(conditions: int) -> st.SearchStrategy[int]:
    """Some of these conditions."""
    return st.integers(0, 2**MAX_CONDITIONS - 1).map(lambda some: some & conditions)


def grouped(when: Step, members: Sequence[Step]) -> list[Step]:
    """The steps as one group, which applies when the first one does. Each keeps its own gate."""
    names = ("span", "trigger", "exclude", "conditions", "any_condition", "schedule")
    shared = {name: getattr(when, name) for name in names}
    last = len(members) - 1
    return [replace(step, parallel=LAST if i == last else MEMBER, **shared) for i, step in enumerate(members)]


def each_group() -> list[Program]:
    """Groups of 1 to 8 entries; two groups, adds and an ordinary operation around them; a group with gates."""
    members = [
        Step(op="low_rank", vector=0, scale=-1.0),
        Step(op="low_rank", vector=1, scale=0.5, bounds=(1.0, 2.0)),
        Step(op="feature", vector=2, bounds=(-1.0, 3.0)),
        Step(op="turn", vector=0, scale=1.0),
        Step(op="turn", vector=1, scale=1.0),
        Step(op="turn_to", vector=2, scale=0.5),
        Step(op="turn_to", vector=3, scale=0.5),
        Step(op="feature", vector=3, bounds=(0.0, 1.0)),
    ]
    add, ablate, always = Step(op="add", scale=2.0), Step(op="ablate", vector=1), Step(op="add")
    gates = [(4, -inf, 0.0), (4, 0.0, inf), (5, 0.5, inf)]
    gated = [
        replace(step, gate=gate, gate_dot=bool(i % 2))
        for i, (step, gate) in enumerate(zip(members, gates, strict=False))
    ]
    return [
        Program(steps=grouped(always, members[:1])),
        Program(steps=[add, *grouped(always, members[3:5]), replace(ablate, vector=2)], keep_norm=True),
        Program(steps=[*grouped(always, members[:4]), *grouped(always, members[4:])]),
        Program(steps=[ablate, *grouped(always, members), add]),
        Program(steps=[*grouped(always, gated), ablate]),
        Program(steps=grouped(replace(always, trigger=2, schedule=(20, 0.5, False)), members[:3])),
        Program(steps=[*grouped(replace(always, span=(0, MAX_POS // 2)), members[:2]), members[2]]),
        Program(steps=[members[0], members[1], add]),
    ]


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """0 to 4 steps in random order. The first ones may measure, for conditions that the others do not ask."""
    counted = draw(st.integers(0, MAX_CONDITIONS - 1))
    measuring = st.builds(
        Step,
        op=st.just("ablate"),
        vector=vectors,
        span=st.tuples(st.just(0), positions),
        measure=st.tuples(st.sampled_from([DOT, COSINE]), st.just(counted), st.booleans()),
    )
    first = draw(st.lists(measuring, max_size=2))
    # One condition is either a sum or the largest number.
    first = [replace(step, measure=first[0].measure) for step in first]
    rest = steps(conditions=(2**MAX_CONDITIONS - 1) & ~(1 << counted))
    chosen = first + draw(st.lists(rest, max_size=MAX_ADDS - len(first)))
    if draw(st.booleans()):
        chosen += grouped(draw(rest), draw(st.lists(steps(ops=READING), min_size=1, max_size=3)))
    return Program(steps=chosen, keep_norm=draw(st.booleans()))


@st.composite
def probed_programs(draw: st.DrawFn) -> Program:
    """0 to 4 steps of which some are probes, in random order, each with its own column."""
    columns = draw(st.permutations(range(NUM_PROBES)))

    def probe(step: Step, column: int) -> Step:
        kind, late = draw(st.sampled_from([DOT, COSINE])), draw(st.booleans())
        op = "ablate" if step.op in READING else step.op  # a probe reads one row
        return replace(step, op=op, gate=None, gate_dot=False, probe=(kind, column, late))

    chosen = draw(st.lists(steps(conditions=2**MAX_CONDITIONS - 1), max_size=MAX_ADDS))
    chosen = [
        probe(step, column) if draw(st.booleans()) else step for step, column in zip(chosen, columns, strict=False)
    ]
    return Program(steps=chosen, keep_norm=draw(st.booleans()))


probed_mixes = st.lists(probed_programs(), min_size=1, max_size=5)
"""One to five programs with probes."""

mixes = st.lists(programs(), min_size=1, max_size=5)
"""One to five programs."""

only_adds = st.builds(Program, steps=st.lists(steps(ops=("add",)), max_size=MAX_ADDS))

batches = st.tuples(mixes, st.just(False)) | st.tuples(st.lists(only_adds, min_size=1, max_size=5), st.just(True))
"""One to five programs, and whether they only add."""
