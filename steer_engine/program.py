"""The compiled form of one request: per block, which bank rows apply, with which coefficients, at which positions.

`template.ProgramTemplate` makes it. It travels to the engine as plain data (ints, floats, digests) inside
`SamplingParams.extra_args`. The prefix cache reads it too: `block_key` names each edit that touches a KV block.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from steer_engine.capture import CaptureRequest
from steer_engine.edit import LARGEST, Measured
from steer_engine.probe import ProbePlan
from steer_engine.trigger import Trigger, Windows

PROGRAM_KEY = "_steer_program"
"""Reserved key of `SamplingParams.extra_args` for a program in wire form. A client that writes it is refused."""

KEY_TAG = "steering"
"""First part of our extra key of a KV block."""

SCORE_KEY = "_steer_score"
"""Reserved key of `SamplingParams.extra_args` for a `Score`, set by `steer_engine.LLM.score`."""

Row = tuple["RowKey", int]
"""The content of a bank row, and the point that it belongs to (see `site`): a number of a block, for its output."""

MEASURES = {"dot": 1, "cosine": 2}
"""The numbers of measures on the device."""
MODES = {"read": 1, "jump": 2, "plane": 3}
"""The numbers of modes on the device."""
MEMBER, LAST = 1, 2
"""Values of `Details.parallel`."""


class RowKey(NamedTuple):
    """What a bank row holds: a weighted sum of vectors at its point's block, or one vector's unit direction."""

    terms: tuple[tuple[str, float], ...]
    """(vector digest, weight), sorted; one term of weight 1 is the vector as it is."""
    unit: bool = False


class Details(NamedTuple):
    """When an entry applies. The names are those of the device's format, `steer_kernels.tables.Entry`.

    trigger, exclude: numbers of the program's triggers; -1 = none. conditions: bit q asks condition q. probe: number of
    the program's probe that the entry measures; on the device its place is the column for the entry's block.
    """

    trigger: int = -1
    exclude: int = -1
    conditions: int = 0
    any_condition: bool = False
    over: int = 0
    slope: float = 0.0
    to: float = 0.0
    exponential: bool = False
    measure: int = 0
    total: int = 0
    largest: bool = False
    probe: int = -1
    late: bool = False
    mode: int = 0
    gate_dot: bool = False
    parallel: int = 0


class Entry(NamedTuple):
    """Adds g(x) * u to x, with u the row and g(x) = c0 + c1*|x| + c2*<x,u> + c3*(clip(<x,u>, lo, hi) - <x,u>).

    start, end: absolute positions, start <= p < end. gate: a row and bounds on cos(x, row), or on <x, row>. details:
    what limits the entry further, or what it measures instead of editing. read: the row r of an entry with a mode.
    """

    row: RowKey
    c0: float = 0.0
    c1: float = 0.0
    c2: float = 0.0
    c3: float = 0.0
    lo: float = -LARGEST
    hi: float = LARGEST
    start: int = 0
    end: int = 0
    gate: tuple[RowKey, float, float] | None = None
    details: Details | None = None
    read: RowKey | None = None

    @property
    def coefficients(self) -> tuple[float, ...]:
        return (self.c0, self.c1, self.c2, self.c3, self.lo, self.hi)


class Sites(NamedTuple):
    """Points that share one list of entries. `blocks` are points: the numbers of blocks, where outputs are edited."""

    blocks: tuple[int, ...]
    entries: tuple[Entry, ...]


@dataclass(frozen=True, kw_only=True)
class Score:
    """Numbers about the next-token distribution after a prompt; the worker computes them, `key` fetches them.

    baseline: key of an earlier request to compare with, or the own key. answers: token ids to report.
    """

    key: str
    baseline: str
    answers: tuple[int, ...]

    def to_wire(self) -> list[Any]:
        return [self.key, self.baseline, list(self.answers)]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> Score:
        key, baseline, answers = wire
        return cls(key=key, baseline=baseline, answers=tuple(answers))


class Covered(NamedTuple):
    """The positions of an edit: start <= p < end, in the windows of one trigger, outside those of another."""

    edit: str
    start: int
    end: int
    trigger: int = -1
    exclude: int = -1

    def to_wire(self) -> list[Any]:
        """Plain data; the triggers only if there are any."""
        return list(self) if self.trigger >= 0 or self.exclude >= 0 else [self.edit, self.start, self.end]

    def within(self, start: int, end: int, windows: Sequence[Windows]) -> list[tuple[int, int]]:
        """The parts [first, end) between two positions, ascending. windows: of each trigger of the program."""
        start, end = max(start, self.start), min(end, self.end)
        if start >= end:
            return []
        parts = [(start, end)] if self.trigger < 0 else windows[self.trigger].within(start, end)
        if self.exclude < 0:
            return parts
        return [rest for part in parts for rest in _without(part, windows[self.exclude].within(*part))]


@dataclass(frozen=True, kw_only=True)
class Program:
    """What one request asks of the workers.

    vectors: digests. identity: where each edit applies, in canonical order, for the prefix cache. conditions: as they
    are measured by entries with `Details.measure`. prompt_len: set if there are conditions or probes.
    """

    sites: tuple[Sites, ...] = ()
    vectors: tuple[str, ...] = ()
    identity: tuple[Covered, ...] = ()
    triggers: tuple[Trigger, ...] = ()
    conditions: tuple[Measured, ...] = ()
    probes: ProbePlan | None = None
    prompt_len: int = 0
    keep_norm: bool = False
    capture: CaptureRequest | None = None
    score: Score | None = None

    @property
    def measures_prompt(self) -> bool:
        """Whether a condition or a probe needs a position before the last one of the prompt, which a cache could
        provide."""
        entries = (entry for site in self.sites for entry in site.entries)
        return any(
            entry.details is not None and entry.details.measure and entry.start < self.prompt_len - 1
            for entry in entries
        )

    @property
    def is_only_watched(self) -> bool:
        """Whether nothing but the operator's monitors applies: the request is not steered."""
        return self.probes is not None and self.probes.num_own_columns == 0 and not self.identity

    @property
    def bank_rows(self) -> frozenset[Row]:
        """The rows that stay pinned while the request runs."""
        return frozenset((key, block) for site in self.sites for key in keys_of(site.entries) for block in site.blocks)

    def to_wire(self) -> dict[str, Any]:
        """Plain lists, ints, floats and strings."""
        wire: dict[str, Any] = {
            "sites": [[list(site.blocks), [_entry_to_wire(entry) for entry in site.entries]] for site in self.sites],
            "vectors": list(self.vectors),
            "identity": [item.to_wire() for item in self.identity],
            "keep_norm": self.keep_norm,
        }
        if self.triggers:
            wire["triggers"] = [trigger.to_wire() for trigger in self.triggers]
        if self.conditions:
            wire["conditions"] = [list(condition) for condition in self.conditions]
        if self.probes is not None:
            wire["probes"] = self.probes.to_wire()
        if self.prompt_len:
            wire["prompt_len"] = self.prompt_len
            wire["measures_prompt"] = self.measures_prompt
        if self.capture is not None:
            wire["capture"] = self.capture.to_wire()
        if self.score is not None:
            wire["score"] = self.score.to_wire()
        return wire

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Program:
        capture, score, probes = wire.get("capture"), wire.get("score"), wire.get("probes")
        return cls(
            sites=tuple(
                Sites(blocks=tuple(blocks), entries=tuple(_entry_from_wire(entry) for entry in entries))
                for blocks, entries in wire["sites"]
            ),
            vectors=tuple(wire["vectors"]),
            identity=tuple(Covered(*item) for item in wire["identity"]),
            triggers=tuple(Trigger.from_wire(trigger) for trigger in wire.get("triggers", ())),
            conditions=tuple(Measured(*condition) for condition in wire.get("conditions", ())),
            probes=ProbePlan.from_wire(probes) if probes else None,
            prompt_len=wire.get("prompt_len", 0),
            keep_norm=wire["keep_norm"],
            capture=CaptureRequest.from_wire(capture) if capture else None,
            score=Score.from_wire(score) if score else None,
        )


def keys_of(entries: Iterable[Entry]) -> set[RowKey]:
    """The bank rows that entries of one block need."""
    entries = tuple(entries)
    gates = {entry.gate[0] for entry in entries if entry.gate}
    return {entry.row for entry in entries} | gates | {entry.read for entry in entries if entry.read}


def _without(part: tuple[int, int], holes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """`part` without `holes`, which are ascending and inside."""
    edges = [part[0], *(edge for hole in holes for edge in hole), part[1]]
    return [(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True) if first < last]


def _row_to_wire(row: RowKey) -> list[Any]:
    return [[list(term) for term in row.terms], row.unit]


def _row_from_wire(wire: list[Any]) -> RowKey:
    return RowKey(terms=tuple((vector, weight) for vector, weight in wire[0]), unit=wire[1])


def _entry_to_wire(entry: Entry) -> list[Any]:
    gate = [_row_to_wire(entry.gate[0]), entry.gate[1], entry.gate[2]] if entry.gate else None
    wire = [_row_to_wire(entry.row), list(entry.coefficients), entry.start, entry.end, gate]
    if entry.details is None:
        return wire
    return [*wire, list(entry.details), *([] if entry.read is None else [_row_to_wire(entry.read)])]


def _entry_from_wire(wire: list[Any]) -> Entry:
    row, coefficients, start, end, gate, *more = wire
    c0, c1, c2, c3, lo, hi = coefficients
    gate_entry = (_row_from_wire(gate[0]), gate[1], gate[2]) if gate else None
    return Entry(
        row=_row_from_wire(row),
        c0=c0,
        c1=c1,
        c2=c2,
        c3=c3,
        lo=lo,
        hi=hi,
        start=start,
        end=end,
        gate=gate_entry,
        details=Details(*more[0]) if more else None,
        read=_row_from_wire(more[1]) if len(more) > 1 else None,
    )


def block_key(program: Mapping[str, Any], windows: Sequence[Windows], start: int, end: int) -> tuple[Any, ...] | None:
    """The extra prefix-cache key of the KV block with positions start <= p < end, or None if no edit touches it.

    For each part of an edit in the block: (edit digest, first offset, last offset). Equal steering shares a block, and
    unsteered blocks are shared with plain traffic. An edit with conditions is named wherever it could apply: its digest
    contains them, and the tokens decide. vLLM calls this several times per block: it is cheap and pure.

    program: in wire form. windows: of each of its triggers, up to `end`.
    """
    touching = tuple(
        (covered[0], first - start, last - 1 - start)
        for covered in program["identity"]
        if covered[1] < end and covered[2] > start
        for first, last in Covered(*covered).within(start, end, windows)
    )
    if not touching:
        return None
    # A tagged pair, like vLLM's own keys. `keep_norm` changes the result of every edit of the request.
    return (KEY_TAG, (*touching, "keep_norm") if program["keep_norm"] else touching)


def published_key(key: tuple[Any, ...]) -> tuple[Any, ...]:
    """A key of `block_key` in the form in which KV events publish it: vLLM sends the item after the tag.

    That item is the key's digest, 16 hexadecimal digits, padded with zeros to 64. External indexers read such a text as
    the digest of an image in the block, so they never file the block as a plain one.
    """
    tag, touching = key
    return tag, hashlib.sha256(repr(touching).encode()).hexdigest()[:16].ljust(64, "0"), touching
