"""The compiled form of a spec: per block, which bank rows apply, with which coefficients, at which positions.

A `ProgramTemplate` is compiled once per spec. `at(prompt_len)` returns the `Program` of one request, which travels to
the engine as plain data (ints, floats, digests) inside `SamplingParams.extra_args`. The prefix cache reads the program
too: `block_key` names each edit that touches a KV block.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

from steer_engine.capture import CaptureRequest
from steer_engine.edit import LARGEST, LAST_PROMPT_TOKEN, PROMPT, Bound, Condition, Edit, Measured, Scope, sha256_of
from steer_engine.spec import Op
from steer_engine.trigger import Trigger, Windows

PROGRAM_KEY = "_steer_program"
"""Reserved key of `SamplingParams.extra_args` for a program in wire form. A client that writes it is refused."""

KEY_TAG = "steering"
"""First part of our extra key of a KV block."""

SCORE_KEY = "_steer_score"
"""Reserved key of `SamplingParams.extra_args` for a `Score`, set by `steer_engine.LLM.score`."""

Row = tuple["RowKey", int]
"""The content of a bank row, and the block that it belongs to."""

MEASURES = {"dot": 1, "cosine": 2}
"""The numbers of measures on the device."""


class RowKey(NamedTuple):
    """What a bank row holds: a weighted sum of vectors at its block, or one vector's unit direction."""

    terms: tuple[tuple[str, float], ...]
    """(vector digest, weight), sorted; one term of weight 1 is the vector as it is."""
    unit: bool = False


class Details(NamedTuple):
    """When an entry applies. The names are those of the device's format, `steer_kernels.tables.Entry`.

    trigger, exclude: numbers of the program's triggers; -1 = none. conditions: bit q asks condition q.
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


class Entry(NamedTuple):
    """Adds g(x) * u to x, with u the row and g(x) = c0 + c1*|x| + c2*<x,u> + c3*(clip(<x,u>, lo, hi) - <x,u>).

    start, end: absolute positions, start <= p < end. gate: a row and bounds on cos(x, row). details: what limits the
    entry further, or what it measures instead of editing.
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

    @property
    def coefficients(self) -> tuple[float, ...]:
        return (self.c0, self.c1, self.c2, self.c3, self.lo, self.hi)


class Sites(NamedTuple):
    """Blocks that share one list of entries."""

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
    are measured by entries with `Details.measure`. prompt_len: set if there are conditions.
    """

    sites: tuple[Sites, ...] = ()
    vectors: tuple[str, ...] = ()
    identity: tuple[Covered, ...] = ()
    triggers: tuple[Trigger, ...] = ()
    conditions: tuple[Measured, ...] = ()
    prompt_len: int = 0
    keep_norm: bool = False
    capture: CaptureRequest | None = None
    score: Score | None = None

    @property
    def measures_prompt(self) -> bool:
        """Whether a condition needs a position before the last one of the prompt, which a cache could provide."""
        entries = (entry for site in self.sites for entry in site.entries)
        return any(
            entry.details is not None and entry.details.measure and entry.start < self.prompt_len - 1
            for entry in entries
        )

    @property
    def bank_rows(self) -> frozenset[Row]:
        """The rows that stay pinned while the request runs."""
        return frozenset((key, block) for site in self.sites for key in _keys(site.entries) for block in site.blocks)

    def to_wire(self) -> dict[str, Any]:
        """Plain lists, ints, floats and strings."""
        wire: dict[str, Any] = {
            "sites": [[list(site.blocks), [_entry_to_wire(entry) for entry in site.entries]] for site in self.sites],
            "vectors": list(self.vectors),
            "identity": [list(item) for item in self.identity],
            "keep_norm": self.keep_norm,
        }
        if self.triggers:
            wire["triggers"] = [trigger.to_wire() for trigger in self.triggers]
        if self.conditions:
            wire["conditions"] = [list(condition) for condition in self.conditions]
            wire["prompt_len"] = self.prompt_len
            wire["measures_prompt"] = self.measures_prompt
        if self.capture is not None:
            wire["capture"] = self.capture.to_wire()
        if self.score is not None:
            wire["score"] = self.score.to_wire()
        return wire

    @classmethod
    def from_wire(cls, wire: dict[str, Any]) -> Program:
        capture, score = wire.get("capture"), wire.get("score")
        return cls(
            sites=tuple(
                Sites(blocks=tuple(blocks), entries=tuple(_entry_from_wire(entry) for entry in entries))
                for blocks, entries in wire["sites"]
            ),
            vectors=tuple(wire["vectors"]),
            identity=tuple(Covered(*item) for item in wire["identity"]),
            triggers=tuple(Trigger.from_wire(trigger) for trigger in wire.get("triggers", ())),
            conditions=tuple(Measured(*condition) for condition in wire.get("conditions", ())),
            prompt_len=wire.get("prompt_len", 0),
            keep_norm=wire["keep_norm"],
            capture=CaptureRequest.from_wire(capture) if capture else None,
            score=Score.from_wire(score) if score else None,
        )


class Placed(NamedTuple):
    """An entry before the prompt length is known. not_before: a position that it must not precede."""

    entry: Entry
    scope: Scope
    not_before: Bound = Bound(False, 0)

    def at(self, prompt_len: int) -> Entry | None:
        """The entry for a prompt; None if it covers no position."""
        start, end = self.scope.at(prompt_len)
        start = max(start, self.not_before.at(prompt_len))
        return self.entry._replace(start=start, end=end) if start < end else None


@dataclass(frozen=True, kw_only=True)
class ProgramTemplate:
    """A program before the prompt length is known: entries with symbolic scopes, blocks with equal entries grouped."""

    sites: tuple[tuple[tuple[int, ...], tuple[Placed, ...]], ...]
    edits: tuple[Edit, ...]
    triggers: tuple[Trigger, ...] = ()
    conditions: tuple[Condition, ...] = ()
    keep_norm: bool = False
    vectors: tuple[str, ...] = field(default=())

    @classmethod
    def compile(cls, edits: Sequence[Edit], *, keep_norm: bool = False) -> ProgramTemplate:
        """Compile `edits`, which are in canonical order."""
        triggers = triggers_of(edits)
        conditions = _unique(condition for edit in edits if edit.when for condition in edit.when.conditions)
        places = Places(triggers, conditions)
        # Most blocks get the same entries, which are made once: `alike` is all that they depend on.
        scales_of = [dict(zip(edit.blocks, edit.scales, strict=True)) for edit in edits]
        early = [edit.when.decided_at if edit.when else None for edit in edits]
        measured = [frozenset(condition.blocks) for condition in conditions]
        blocks_of: dict[tuple[Any, ...], list[int]] = {}
        for block in sorted({block for edit in edits for block in edit.blocks}.union(*measured)):
            doses = tuple(scale_at.get(block) for scale_at in scales_of)
            decided = tuple(last is None or block > last for last in early)
            alike = (doses, decided, tuple(block in blocks for blocks in measured))
            blocks_of.setdefault(alike, []).append(block)
        by_entries: dict[tuple[Placed, ...], list[int]] = {}
        for (doses, decided, measures), blocks in blocks_of.items():
            given = [
                (edit, scale, known)
                for edit, scale, known in zip(edits, doses, decided, strict=True)
                if scale is not None
            ]
            measuring = [_measuring(condition, q) for q, condition in enumerate(conditions) if measures[q]]
            if entries := (*measuring, *_entries_of(given, places)):
                by_entries.setdefault(entries, []).extend(blocks)
        return cls(
            sites=tuple((tuple(sorted(blocks)), entries) for entries, blocks in by_entries.items()),
            edits=tuple(edits),
            triggers=triggers,
            conditions=conditions,
            keep_norm=keep_norm,
            vectors=tuple(sorted(set().union(*(edit.vectors for edit in edits)))),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that the spec changes, whatever its vectors are called."""
        placed = [[edit.digest, edit.scope.wire] for edit in self.edits]
        return sha256_of([placed, self.keep_norm and bool(placed)])

    @cached_property
    def rows(self) -> int:
        """Rows or entries at the block that needs most."""
        return max((_rows_of(entries) for _, entries in self.sites), default=0)

    @cached_property
    def num_bank_rows(self) -> int:
        """Bank rows that a request needs at most, over all blocks."""
        return sum(len(blocks) * len(_keys([placed.entry for placed in entries])) for blocks, entries in self.sites)

    def at(self, prompt_len: int) -> Program:
        """The program for a prompt of `prompt_len` tokens, without the edits that cover no position."""
        sites = []
        for blocks, placed in self.sites:
            entries = tuple(entry for each in placed if (entry := each.at(prompt_len)) is not None)
            if any(entry.details is None or not entry.details.measure for entry in entries) or (
                self.conditions and entries
            ):
                sites.append(Sites(blocks=blocks, entries=entries))
        identity = self.covered(prompt_len)
        return Program(
            sites=tuple(sites) if identity else (),
            vectors=self.vectors if identity else (),
            identity=identity,
            triggers=self.triggers,
            conditions=tuple(condition.measured_at(prompt_len) for condition in self.conditions),
            prompt_len=prompt_len if self.conditions else 0,
            keep_norm=self.keep_norm,
        )

    def covered(self, prompt_len: int) -> tuple[Covered, ...]:
        """Where each edit applies, without the edits that cover no position."""
        found = (covered_by(edit, self.triggers, prompt_len) for edit in self.edits)
        return tuple(covered for covered in found if covered is not None)


def covered_by(edit: Edit, triggers: Sequence[Trigger], prompt_len: int) -> Covered | None:
    """Where an edit applies; None = nowhere. triggers: those of the edit are among them."""
    start, end = edit.scope.at(prompt_len)
    start = max(start, prompt_len - 1) if edit.when else start
    if start >= end:
        return None
    trigger, exclude = edit.scope.trigger, edit.scope.exclude
    return Covered(
        edit.digest,
        start,
        end,
        -1 if trigger is None else triggers.index(trigger),
        -1 if exclude is None else triggers.index(exclude),
    )


class Places(NamedTuple):
    """The numbers of triggers and conditions in a program: their order here."""

    triggers: tuple[Trigger, ...]
    conditions: tuple[Condition, ...]

    def details(self, edit: Edit) -> Details | None:
        """None for an edit whose scope is a span, without a schedule and conditions."""
        scope, schedule, when = edit.scope, edit.schedule, edit.when
        details = Details(
            trigger=-1 if scope.trigger is None else self.triggers.index(scope.trigger),
            exclude=-1 if scope.exclude is None else self.triggers.index(scope.exclude),
        )
        if schedule is not None:
            details = details._replace(
                over=schedule.over, slope=schedule.slope, to=schedule.to, exponential=schedule.exponential
            )
        if when is not None:
            asked = sum(1 << self.conditions.index(condition) for condition in set(when.conditions))
            details = details._replace(conditions=asked, any_condition=when.any)
        return None if details == Details() else details


def triggers_of(edits: Iterable[Edit]) -> tuple[Trigger, ...]:
    """The triggers of the edits, each once."""
    return _unique(trigger for edit in edits for trigger in (edit.scope.trigger, edit.scope.exclude) if trigger)


def _unique(items: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(items))


def _without(part: tuple[int, int], holes: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """`part` without `holes`, which are ascending and inside."""
    edges = [part[0], *(edge for hole in holes for edge in hole), part[1]]
    return [(first, last) for first, last in zip(edges[::2], edges[1::2], strict=True) if first < last]


def _measuring(condition: Condition, number: int) -> Placed:
    """The entry that measures a condition at one of its blocks. Before all edits, so that it reads the unedited x."""
    largest = condition.at == "max_prompt"
    details = Details(measure=MEASURES[condition.measure], total=number, largest=largest)
    row = RowKey(terms=((condition.vector, 1.0),))
    scope = LAST_PROMPT_TOKEN if condition.at == "last_prompt_token" else PROMPT
    return Placed(Entry(row=row, details=details), scope)


def _entries_of(doses: Sequence[tuple[Edit, float, bool]], places: Places) -> list[Placed]:
    """The entries of one block. In a run of adds that always apply in full, those of one scope are summed into one row.

    doses: an edit, its scale, and whether its conditions have been decided before this block is computed.
    """
    entries: list[Placed] = []
    for commutes, run in groupby(doses, key=lambda dose: dose[0].commutes):
        if not commutes:
            for edit, scale, decided in run:
                not_before = Bound(True, -1 if decided else 0) if edit.when else Bound(False, 0)
                entry = _entry_of(edit, scale)._replace(details=places.details(edit))
                entries.append(Placed(entry, edit.scope, not_before))
            continue
        sums: dict[Scope, dict[str, float]] = {}
        details: dict[Scope, Details | None] = {}
        for edit, scale, _ in run:
            details[edit.scope] = places.details(edit)
            terms = sums.setdefault(edit.scope, {})
            terms[edit.vector] = terms.get(edit.vector, 0.0) + scale
        for scope, terms in sorted(sums.items(), key=lambda item: item[0].order):
            weighted = tuple(sorted((vector, scale) for vector, scale in terms.items() if scale))
            if len(weighted) == 1:
                # A single vector: the row holds it unscaled, so that all its scales share the row.
                entry = Entry(row=RowKey(terms=((weighted[0][0], 1.0),)), c0=weighted[0][1], details=details[scope])
                entries.append(Placed(entry, scope))
            elif weighted:
                entries.append(Placed(Entry(row=RowKey(terms=weighted), c0=1.0, details=details[scope]), scope))
    return entries


def _entry_of(edit: Edit, scale: float) -> Entry:
    whole = RowKey(terms=((edit.vector, 1.0),))
    unit = RowKey(terms=((edit.vector, 1.0),), unit=True)
    gate = None
    if edit.gate is not None:
        gate = (RowKey(terms=((edit.gate.vector, 1.0),), unit=True), edit.gate.min_cos, edit.gate.max_cos)
    match edit.op:
        case Op.ADD:
            return Entry(row=whole, c0=scale, gate=gate)
        case Op.ADD_RELATIVE:
            return Entry(row=unit, c1=scale, gate=gate)
        case Op.ABLATE:
            return Entry(row=unit, c2=-scale, gate=gate)
        case Op.CLAMP | Op.SET:
            lo = -LARGEST if edit.lo is None else edit.lo
            hi = LARGEST if edit.hi is None else edit.hi
            return Entry(row=unit, c3=1.0, lo=lo, hi=hi, gate=gate)


def _rows_of(entries: Sequence[Placed]) -> int:
    return max(len(entries), len(_keys([placed.entry for placed in entries])))


def _keys(entries: Sequence[Entry]) -> set[RowKey]:
    return {entry.row for entry in entries} | {entry.gate[0] for entry in entries if entry.gate}


def _row_to_wire(row: RowKey) -> list[Any]:
    return [[list(term) for term in row.terms], row.unit]


def _row_from_wire(wire: list[Any]) -> RowKey:
    return RowKey(terms=tuple((vector, weight) for vector, weight in wire[0]), unit=wire[1])


def _entry_to_wire(entry: Entry) -> list[Any]:
    gate = [_row_to_wire(entry.gate[0]), entry.gate[1], entry.gate[2]] if entry.gate else None
    wire = [_row_to_wire(entry.row), list(entry.coefficients), entry.start, entry.end, gate]
    return wire if entry.details is None else [*wire, list(entry.details)]


def _entry_from_wire(wire: list[Any]) -> Entry:
    row, coefficients, start, end, gate, *details = wire
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
        details=Details(*details[0]) if details else None,
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
