"""The persistent buffers that all kernels use, and the binary format of one entry of a program.

Legend: T tokens, S slots, L sites (armed blocks), E entries per site, W words per entry, R bank rows, D hidden size,
C capture rows, M sites that capture, J triggers of a slot, P words per trigger, H positions of history, Q conditions of
a slot, K probes of a slot. An entry is one step of a program at one site:

    x' = x + share * g(x) * w        g(x) = c0 + c1*|x| + c2*<x,w> + c3*(clip(<x,w>, lo, hi) - <x,w>)

It applies to rows at positions start <= p < end whose cosine with the gate row is in [min_cos, max_cos]. An entry with
details is limited further: to the windows of a trigger (see `triggers`), to positions outside another trigger's
windows, to slots whose conditions hold; and its schedule sets the share, which is 1 otherwise. An entry that measures
edits nothing: it adds <x,w> or cos(x,w) to a condition's total, or keeps the largest. A probe is an entry that measures
for the row alone: it writes that number where the row's share is not 0.

An entry with a mode reads a second row r of the bank, whose number is in the word of c1:

    READ     g(x) = c0 + c2*<x,r> + c3*(clip(<x,r>, lo, hi) - <x,r>)
    JUMP     g(x) = c0 + (c2*<x,r> + c3 if lo <= <x,r> <= hi else 0)
    PLANE    g(x) = c0*hypot(<x,w>, <x,r>) + c2*<x,w> + c3*<x,r>

Entries with a mode may form a group of up to MAX_PARALLEL that follow each other: all of them read the x before the
group. The entries of a group have the same span, trigger, conditions and schedule.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import torch

NUM_WORDS: Final = 16
"""int32 words per entry: 64 bytes, so that an entry never spans two cache lines."""

MAX_POSITION: Final = 2**31 - 1
"""The `end` of an open span. Position 2**31 - 1 itself cannot be edited."""

# An add without details uses only the first 16 bytes (4 words). The sign bit of START says that WHEN to TO are used.
ROW, START, END, C0, C1, C2, C3, LO, HI, GATE_ROW, GATE_MIN, GATE_MAX, WHEN, OVER, SLOPE, TO = range(16)
_FORMAT: Final = struct.Struct("=3i6fi2f2i2f")
DETAILS: Final = -(2**31)
"""The sign bit of START."""

MAX_TRIGGERS: Final = 8
"""Triggers of a slot."""
MAX_TRIGGER_TOKENS: Final = 8
"""Tokens of one sequence that opens or closes a window."""
MAX_CONDITIONS: Final = 8
"""Conditions of a slot."""

PROBE_COLUMN: Final = GATE_ROW
"""A probe has no gate: the word is its column of `probed_TK`."""
READ_ROW: Final = C1
"""An entry with a mode has no c1: the word is the bank row r that it reads."""
MAX_PARALLEL: Final = 8
"""Entries of a group. The kernels keep their numbers in registers until the group ends."""

# The bit fields of WHEN: (first bit, number of bits).
(TRIGGER, EXCEPT, CONDITIONS, ANY, EXPONENTIAL, MEASURE, TOTAL, LARGEST, PROBE, LATE, MODE, GATE_DOT, PARALLEL) = (
    (0, 4),
    (4, 4),
    (8, 8),
    (16, 1),
    (17, 1),
    (18, 2),
    (20, 3),
    (23, 1),
    (24, 1),
    (25, 1),
    (26, 2),
    (28, 1),
    (29, 2),
)
DOT: Final = 1
COSINE: Final = 2
"""Values of MEASURE; 0 = the entry edits."""
READ: Final = 1
JUMP: Final = 2
PLANE: Final = 3
"""Values of MODE; 0 = the entry reads the row that it writes."""
MEMBER: Final = 1
LAST: Final = 2
"""Values of PARALLEL; 0 = the entry is in no group."""

# Words of a trigger. The sequences are stored last token first.
EACH, LENGTH, AFTER, UNTIL = 0, 1, 2, 2 + MAX_TRIGGER_TOKENS
TRIGGER_WORDS: Final = 2 + 2 * MAX_TRIGGER_TOKENS
ANY_TOKEN: Final = -2
"""Matches every token, even one before the first: pads a sequence."""
NO_TOKEN: Final = -3
"""Matches nothing: the first token of an absent sequence."""
NEVER: Final = -2
"""In place of a position: a sequence that has not occurred."""


class Entry(NamedTuple):
    """One step of a program, decoded. Floats are float32 values."""

    row: int
    """Bank row w. Already a unit vector if the operation needs one."""
    start: int = 0
    end: int = MAX_POSITION
    c0: float = 0.0
    c1: float = 0.0
    c2: float = 0.0
    c3: float = 0.0
    lo: float = 0.0
    hi: float = 0.0
    gate_row: int = -1
    """Bank row whose cosine (or, with `gate_dot`, dot product) with x is tested. -1 = no gate."""
    min_cos: float = -np.inf
    max_cos: float = np.inf
    trigger: int = -1
    """Applies only in the windows of this trigger of the slot. -1 = everywhere."""
    exclude: int = -1
    """Does not apply in the windows of this trigger. -1 = no exception."""
    conditions: int = 0
    """Bit q: condition q of the slot is asked. 0 = unconditional."""
    any_condition: bool = False
    """One condition that holds is enough; otherwise all must hold."""
    over: int = 0
    """Tokens until the schedule has reached `to`; 0 = no schedule."""
    slope: float = 0.0
    """Linear: change of the share per token. Exponential: change of its binary logarithm."""
    to: float = 0.0
    """The share after `over` tokens."""
    exponential: bool = False
    measure: int = 0
    """DOT or COSINE: add that number to condition `total` instead of editing, or write it as a probe."""
    total: int = 0
    largest: bool = False
    """Keep the largest number instead of the sum."""
    probe: int = -1
    """Column of `probed_TK` that the number is written to; it then counts for no condition. -1 = no probe."""
    late: bool = False
    """Probe x after all edits of the site and the kept norm. Otherwise x as it is when the entry's turn comes; the
    compiler puts such probes before the edits, so that they see the unedited x."""
    mode: int = 0
    """READ, JUMP or PLANE: how the entry uses `read_row`."""
    read_row: int = -1
    """Bank row r. Used only with a mode; then c1 is 0."""
    gate_dot: bool = False
    """The gate tests the dot product: min_cos and max_cos are its bounds."""
    parallel: int = 0
    """MEMBER or LAST of a group of entries that read the x before the group."""


_NO_DETAILS = Entry(row=0)[12:]


def encode_entry(entry: Entry) -> np.ndarray:
    """Pack an entry into int32 [W], ready to be copied into `entries_SLEW[slot, site, e]`.

    Raises struct.error or OverflowError if a number does not fit into int32 or float32.
    """
    start, when, gate_row = entry.start, 0, entry.gate_row
    if entry[12:] != _NO_DETAILS:
        start |= DETAILS
        fields = (
            (TRIGGER, entry.trigger + 1),
            (EXCEPT, entry.exclude + 1),
            (CONDITIONS, entry.conditions),
            (ANY, entry.any_condition),
            (EXPONENTIAL, entry.exponential),
            (MEASURE, entry.measure),
            (TOTAL, entry.total),
            (LARGEST, entry.largest),
            (PROBE, entry.probe >= 0),
            (LATE, entry.late),
            (MODE, entry.mode),
            (GATE_DOT, entry.gate_dot),
            (PARALLEL, entry.parallel),
        )
        for (first, bits), value in fields:
            assert 0 <= value < 1 << bits, "a detail of an entry is out of range"
            when |= int(value) << first
        assert entry.probe >= -1, "a detail of an entry is out of range"
        assert entry.probe >= 0 or not entry.late, "only a probe can be late"
        assert entry.mode or not entry.parallel, "an entry of a group has a mode"
        assert not entry.mode or (entry.c1 == 0.0 and not entry.measure), "an entry with a mode has no c1 and edits"
        if entry.probe >= 0:
            assert entry.measure, "a probe measures the dot product or the cosine"
            assert gate_row == -1, "a probe has no gate"
            gate_row = entry.probe
    words = (entry.row, start, *entry[2:9], gate_row, *entry[10:12], when, entry.over, entry.slope, entry.to)
    packed_W = np.frombuffer(bytearray(_FORMAT.pack(*words)), dtype=np.int32)
    if entry.mode:
        packed_W[READ_ROW] = entry.read_row
    return packed_W


def decode_entry(words_W: np.ndarray) -> Entry:
    """Unpack what `encode_entry` packed; for tests, logs and introspection."""
    words_W = np.ascontiguousarray(words_W, dtype=np.int32)
    row, start, *numbers, when, over, slope, to = _FORMAT.unpack(words_W.tobytes())
    end, c0, c1, c2, c3, lo, hi, gate_row, min_cos, max_cos = numbers
    if start >= 0:
        when, over, slope, to = 0, 0, 0.0, 0.0

    def field(place: tuple[int, int]) -> int:
        return int(when) >> place[0] & (1 << place[1]) - 1

    probe, mode = gate_row if field(PROBE) else -1, field(MODE)
    return Entry(
        row=row,
        start=start & MAX_POSITION,
        end=end,
        c0=c0,
        c1=0.0 if mode else c1,
        c2=c2,
        c3=c3,
        lo=lo,
        hi=hi,
        gate_row=-1 if field(PROBE) else gate_row,
        min_cos=min_cos,
        max_cos=max_cos,
        trigger=field(TRIGGER) - 1,
        exclude=field(EXCEPT) - 1,
        conditions=field(CONDITIONS),
        any_condition=bool(field(ANY)),
        over=over,
        slope=slope,
        to=to,
        exponential=bool(field(EXPONENTIAL)),
        measure=field(MEASURE),
        total=field(TOTAL),
        largest=bool(field(LARGEST)),
        probe=probe,
        late=bool(field(LATE)),
        mode=mode,
        read_row=int(words_W[READ_ROW]) if mode else -1,
        gate_dot=bool(field(GATE_DOT)),
        parallel=field(PARALLEL),
    )


def encode_trigger(after: Sequence[int], until: Sequence[int], *, each: bool, length: int) -> np.ndarray:
    """Pack a trigger into int32 [P], ready to be copied into `triggers_SJP[slot, j]`.

    after, until: token ids; an empty `after` opens a window at position 0, an empty `until` never closes one.
    each: open a window after every occurrence, otherwise after the first. length: tokens of a window at most.
    """
    words_P = np.full(TRIGGER_WORDS, ANY_TOKEN, dtype=np.int32)
    words_P[EACH], words_P[LENGTH] = each, length
    for place, sequence in ((AFTER, after), (UNTIL, until)):
        assert len(sequence) <= MAX_TRIGGER_TOKENS, "a sequence of a trigger is too long"
        words_P[place : place + max(1, len(sequence))] = list(reversed(sequence)) or [NO_TOKEN]
    return words_P


@dataclass(kw_only=True, slots=True)
class Tables:
    """Device buffers at fixed addresses. Their contents change between steps; the tensors are never replaced.

    Slot 0 means "not steered": its counts stay 0 and its span stays (0, 0). All-zero buffers steer nothing.
    """

    bank_RD: torch.Tensor
    """[R, D] rows of the vectors in use, in the model's dtype or float32, contiguous, 16-byte aligned."""
    entries_SLEW: torch.Tensor
    """int32 [S, L, E, W]; see `encode_entry`. Applied in order, each to the row as edited by the entries before it."""
    counts_SL: torch.Tensor
    """int32 [S, L]: how many of the E entries are used; 0 = no edit."""
    keep_norm_S: torch.Tensor
    """int32 [S]: 1 = rescale an edited row to its norm before the edit (ignored with `adds_only`)."""
    span_S2: torch.Tensor
    """int32 [S, 2]: smallest start and largest end of the slot's entries over all sites. Rows outside are routed to
    slot 0, so a `generation` program adds no cost to prompt rows. (0, 0) = the slot has no program."""
    slot_T: torch.Tensor
    """int32 [max tokens]: slot whose program applies to the row; 0 = none. Written by `route_rows`."""
    pos_T: torch.Tensor
    """int32 [max tokens]: absolute position of the row's token; 0 on unsteered rows."""
    triggers_SJP: torch.Tensor
    """int32 [S, J, P]; see `encode_trigger`."""
    num_triggers_S: torch.Tensor
    """int32 [S]: how many of the J triggers are used."""
    history_SHC: torch.Tensor
    """int32 [S, H, 1 + 2J]: for position p at p % H, the token, and for each trigger the position where `after` last
    (or first) ended before p and where `until` last ended up to p. It reaches back beyond draft tokens that were
    rejected. See `triggers`."""
    windows_TJ: torch.Tensor
    """int32 [max tokens, J]: first position of the window that the row is in; MAX_POSITION = in none. Written by
    `advance_triggers` for rows whose slot has triggers; entries of other rows never read it."""
    measured_SQ: torch.Tensor
    """float64 [S, Q]: the conditions' sums, or largest numbers."""
    bounds_SQ2: torch.Tensor
    """float64 [S, Q, 2]: condition q holds if its number is strictly between the two."""
    capture_T: torch.Tensor | None = None
    """int32 [max tokens]: 0 = not captured; k = store x before the edit in row k - 1 of the site's capture rows; -k =
    store x after the edit there."""
    captured_MCD: torch.Tensor | None = None
    """[M, C, D]: captured rows of the M sites that have some, in float32 or the model's dtype, contiguous, 16-byte
    aligned."""
    capture_places: dict[int, int] = field(default_factory=dict)
    """Site -> its place in `captured_MCD`."""
    probed_TK: torch.Tensor | None = None
    """float32 [max tokens, K]: the numbers of each row's probes. The host fills it with NaN before a step; a column
    that no probe of the row writes keeps what it has. None = no probes."""

    @classmethod
    def allocate(
        cls,
        *,
        num_slots: int,
        num_sites: int,
        num_entries: int,
        num_rows: int,
        hidden_size: int,
        max_tokens: int,
        bank_dtype: torch.dtype,
        device: torch.device | str = "cpu",
        num_drafts: int = 0,
        capture_rows: int = 0,
        capture_sites: Sequence[int] | None = None,
        capture_dtype: torch.dtype = torch.float32,
        num_probes: int = 0,
    ) -> Tables:
        """Zeroed buffers, which steer and capture nothing.

        num_slots: includes slot 0. num_drafts: draft tokens of a request in one step, at most. num_probes: K; 0 = the
        tables have no buffer for probes. capture_sites: those with capture rows; default: all.
        """

        def int32(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        def float64(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        num_positions = 1 + num_drafts + MAX_TRIGGER_TOKENS
        probed = torch.zeros(max_tokens, num_probes, dtype=torch.float32, device=device)
        sites = tuple(range(num_sites) if capture_sites is None else capture_sites) if capture_rows else ()
        captured = torch.zeros(len(sites), capture_rows, hidden_size, dtype=capture_dtype, device=device)
        return cls(
            bank_RD=torch.zeros(num_rows, hidden_size, dtype=bank_dtype, device=device),
            entries_SLEW=int32(num_slots, num_sites, num_entries, NUM_WORDS),
            counts_SL=int32(num_slots, num_sites),
            keep_norm_S=int32(num_slots),
            span_S2=int32(num_slots, 2),
            slot_T=int32(max_tokens),
            pos_T=int32(max_tokens),
            triggers_SJP=int32(num_slots, MAX_TRIGGERS, TRIGGER_WORDS),
            num_triggers_S=int32(num_slots),
            history_SHC=int32(num_slots, num_positions, 1 + 2 * MAX_TRIGGERS),
            windows_TJ=int32(max_tokens, MAX_TRIGGERS),
            measured_SQ=float64(num_slots, MAX_CONDITIONS),
            bounds_SQ2=float64(num_slots, MAX_CONDITIONS, 2),
            capture_T=int32(max_tokens) if sites else None,
            captured_MCD=captured if sites else None,
            capture_places={site: place for place, site in enumerate(sites)},
            probed_TK=probed if num_probes else None,
        )

    def captured_at(self, site: int) -> torch.Tensor | None:
        """[C, D]: the capture rows of a site; None if it has none."""
        place = self.capture_places.get(site)
        return None if place is None or self.captured_MCD is None else self.captured_MCD[place]
