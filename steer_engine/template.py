"""A program before the prompt length is known: compiled once per spec, and completed for each prompt."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from math import isfinite
from typing import Any, NamedTuple

from steer_engine.edit import LARGEST, LAST_PROMPT_TOKEN, PROMPT, Bound, Condition, Dose, Edit, Scope, sha256_of
from steer_engine.probe import Probe, ProbePlan, StopRule
from steer_engine.program import LAST, MEASURES, MEMBER, MODES, Covered, Details, Entry, Program, RowKey, Sites, keys_of
from steer_engine.site import block_of
from steer_engine.spec import Op
from steer_engine.trigger import Trigger


class Placed(NamedTuple):
    """An entry before the prompt length is known. not_before: a position that it must not precede."""

    entry: Entry
    scope: Scope
    not_before: Bound = Bound(False, 0)

    @property
    def is_probe(self) -> bool:
        return self.entry.details is not None and self.entry.details.probe >= 0

    def at(self, prompt_len: int) -> Entry | None:
        """The entry for a prompt; None if it covers no position."""
        first, end = self.scope.at(prompt_len)
        start = max(first, self.not_before.at(prompt_len))
        if start >= end:
            return None
        entry = _advanced(self.entry, start - first)
        return None if entry is None else entry._replace(start=start, end=end)


def _advanced(entry: Entry, tokens: int) -> Entry | None:
    """The entry as its schedule has it after `tokens`, since the device counts from the entry's own first position.

    None if it has faded to nothing. A schedule that counts from the windows of a trigger stays as it is.
    """
    details = entry.details
    if details is None or not details.over or details.trigger >= 0 or not tokens:
        return entry
    if tokens >= details.over:
        share, details = details.to, details._replace(over=0, slope=0.0, to=0.0, exponential=False)
    elif details.exponential:
        share = 2.0 ** (details.slope * tokens)
        details = details._replace(over=details.over - tokens, to=details.to / share)
    else:
        share = 1.0 + details.slope * tokens
        details = details._replace(over=details.over - tokens, slope=details.slope / share, to=details.to / share)
    if share == 0.0:
        return None
    coefficients = {name: share * getattr(entry, name) for name in ("c0", "c1", "c2", "c3")}
    return entry._replace(**coefficients, details=details)


@dataclass(frozen=True, kw_only=True)
class ProgramTemplate:
    """A program before the prompt length is known: entries with symbolic scopes, points with equal entries grouped."""

    sites: tuple[tuple[tuple[int, ...], tuple[Placed, ...]], ...]
    edits: tuple[Edit, ...]
    triggers: tuple[Trigger, ...] = ()
    conditions: tuple[Condition, ...] = ()
    probes: tuple[Probe, ...] = ()
    stops: tuple[StopRule, ...] = ()
    keep_norm: bool = False
    vectors: tuple[str, ...] = field(default=())

    @classmethod
    def compile(
        cls,
        edits: Sequence[Edit],
        *,
        keep_norm: bool = False,
        probes: Sequence[Probe] = (),
        stops: Sequence[StopRule] = (),
    ) -> ProgramTemplate:
        """Compile `edits`, which are in canonical order, and the probes."""
        triggers = triggers_of(edits, probes)
        conditions = _unique(condition for edit in edits if edit.when for condition in edit.when.conditions)
        places = Places(triggers, conditions)
        # Most points get the same entries, which are made once: `alike` is all that they depend on.
        early = [edit.when.decided_at if edit.when else None for edit in edits]
        measured = [frozenset(each.points) for each in (*conditions, *probes)]
        points_of: dict[tuple[Any, ...], list[int]] = {}
        for point in sorted({point for edit in edits for point in edit.points}.union(*measured)):
            doses = tuple(edit.doses.get(point) for edit in edits)
            decided = tuple(last is None or block_of(point) > last for last in early)
            alike = (doses, decided, tuple(point in points for points in measured))
            points_of.setdefault(alike, []).append(point)
        by_entries: dict[tuple[Placed, ...], list[int]] = {}
        for (doses, decided, measures), points in points_of.items():
            given = [
                (edit, dose, known) for edit, dose, known in zip(edits, doses, decided, strict=True) if dose is not None
            ]
            measuring = [_measuring(condition, q) for q, condition in enumerate(conditions) if measures[q]]
            probing = [
                (probe.after, places.probing(probe, number))
                for number, probe in enumerate(probes)
                if measures[len(conditions) + number]
            ]
            early_probes = [entry for after, entry in probing if not after]
            late_probes = [entry for after, entry in probing if after]
            if entries := (*measuring, *early_probes, *_entries_of(given, places), *late_probes):
                by_entries.setdefault(entries, []).extend(points)
        return cls(
            sites=tuple((tuple(sorted(points)), entries) for entries, points in by_entries.items()),
            edits=tuple(edits),
            triggers=triggers,
            conditions=conditions,
            probes=tuple(probes),
            stops=tuple(stops),
            keep_norm=keep_norm,
            vectors=tuple(sorted(set().union(*(edit.vectors for edit in edits), {probe.vector for probe in probes}))),
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that the spec changes, whatever its vectors are called."""
        placed = [[edit.digest, edit.scope.wire] for edit in self.edits]
        content: list[Any] = [placed, self.keep_norm and bool(placed)]
        if self.stops:  # numbers that end nothing change nothing
            measured = [
                [probe.vector, probe.points, probe.scope.wire, probe.measure, probe.after] for probe in self.probes
            ]
            rules = [[stop.column, _plain(stop.low), _plain(stop.high), stop.tokens] for stop in self.stops]
            content.append(["stop", measured, rules])
        return sha256_of(content)

    @cached_property
    def rows(self) -> int:
        """Rows or entries at the block that needs most, without those of probes."""
        return max((_rows_of([each for each in entries if not each.is_probe]) for _, entries in self.sites), default=0)

    @cached_property
    def rows_with_probes(self) -> int:
        """The same with those of probes."""
        return max((_rows_of(entries) for _, entries in self.sites), default=0)

    @cached_property
    def num_entries(self) -> int:
        """Entries at the block that has most, without those of probes."""
        return max((sum(not each.is_probe for each in entries) for _, entries in self.sites), default=0)

    @cached_property
    def num_bank_rows(self) -> int:
        """Bank rows that a request needs at most, over all blocks."""
        return sum(len(blocks) * len(keys_of(placed.entry for placed in entries)) for blocks, entries in self.sites)

    def at(self, prompt_len: int) -> Program:
        """The program for a prompt of `prompt_len` tokens, without the edits that cover no position."""
        sites = []
        for blocks, placed in self.sites:
            entries = tuple(entry for each in placed if (entry := each.at(prompt_len)) is not None)
            if entries:
                sites.append(Sites(blocks=blocks, entries=entries))
        identity = self.covered(prompt_len)
        if not identity and not self.probes:
            return Program(triggers=self.triggers, keep_norm=self.keep_norm)
        return Program(
            sites=tuple(sites),
            vectors=self.vectors,
            identity=identity,
            triggers=self.triggers,
            conditions=tuple(each.measured_at(prompt_len) for each in self.conditions),
            probes=self._probe_plan(prompt_len),
            prompt_len=prompt_len if self.conditions or self.probes else 0,
            keep_norm=self.keep_norm,
        )

    def _probe_plan(self, prompt_len: int) -> ProbePlan | None:
        if not self.probes:
            return None
        start = min(prompt_len - 1, *(probe.scope.at(prompt_len)[0] for probe in self.probes))
        return ProbePlan(tuple(probe.points for probe in self.probes), start, self.stops)

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
    name = edit.digest
    if edit.schedule is not None and edit.scope.trigger is None and edit.scope.start.from_end:
        # It counts from a position that depends on the prompt's length, and that an exception may hide.
        name += f"@{edit.scope.at(prompt_len)[0]}"
    return Covered(name, start, end, _number_of(edit.scope.trigger, triggers), _number_of(edit.scope.exclude, triggers))


def _number_of(trigger: Trigger | None, triggers: Sequence[Trigger]) -> int:
    """The trigger's number in the program; -1 for none."""
    return -1 if trigger is None else triggers.index(trigger)


class Places(NamedTuple):
    """The numbers of triggers and conditions in a program: their order here."""

    triggers: tuple[Trigger, ...]
    conditions: tuple[Condition, ...]

    def windows(self, scope: Scope) -> Details:
        """The windows of a scope, without anything else."""
        return Details(_number_of(scope.trigger, self.triggers), _number_of(scope.exclude, self.triggers))

    def details(self, edit: Edit) -> Details | None:
        """None for an edit whose scope is a span, without a schedule and conditions."""
        schedule, when = edit.schedule, edit.when
        details = self.windows(edit.scope)
        if schedule is not None:
            details = details._replace(
                over=schedule.over, slope=schedule.slope, to=schedule.to, exponential=schedule.exponential
            )
        if when is not None:
            asked = sum(1 << self.conditions.index(condition) for condition in set(when.conditions))
            details = details._replace(conditions=asked, any_condition=when.any)
        if edit.gate is not None and edit.gate.dot:
            details = details._replace(gate_dot=True)
        return None if details == Details() else details

    def probing(self, probe: Probe, number: int) -> Placed:
        """The entry that measures a probe at one of its blocks."""
        details = self.windows(probe.scope)._replace(measure=MEASURES[probe.measure], probe=number, late=probe.after)
        return Placed(Entry(row=_measured_row(probe.vector, probe.measure), details=details), probe.scope)


def triggers_of(edits: Iterable[Edit], probes: Iterable[Probe] = ()) -> tuple[Trigger, ...]:
    """The triggers of edits and probes, each once."""
    scopes = [edit.scope for edit in edits] + [probe.scope for probe in probes]
    return _unique(trigger for scope in scopes for trigger in (scope.trigger, scope.exclude) if trigger)


def _unique(items: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(items))


def _measuring(condition: Condition, number: int) -> Placed:
    """The entry that measures a condition at one of its blocks. Before all edits, so that it reads the unedited x."""
    largest = condition.at == "max_prompt"
    details = Details(measure=MEASURES[condition.measure], total=number, largest=largest)
    scope = LAST_PROMPT_TOKEN if condition.at == "last_prompt_token" else PROMPT
    return Placed(Entry(row=_measured_row(condition.vector, condition.measure), details=details), scope)


def _measured_row(vector: str, measure: str) -> RowKey:
    # The squares of a very long or short row would leave float32's range; a unit row is as good for a cosine.
    return RowKey(terms=((vector, 1.0),), unit=measure == "cosine")


def _plain(bound: float) -> float | None:
    """A bound for a digest, whose JSON has no infinity."""
    return bound if isfinite(bound) else None


def _entries_of(doses: Sequence[tuple[Edit, Dose, bool]], places: Places) -> list[Placed]:
    """The entries of one block. In a run of adds that always apply in full, those of one scope are summed into one row.

    doses: an edit, what it does at the block, and whether its conditions have been decided before this block is
    computed.
    """
    entries: list[Placed] = []
    for commutes, run in groupby(doses, key=lambda dose: dose[0].commutes):
        if not commutes:
            for edit, dose, decided in run:
                not_before = Bound(True, -1 if decided else 0) if edit.when else Bound(False, 0)
                limits = places.details(edit)
                made = _of_parts(edit, dose, limits) if dose.parts else [_entry_of(edit, dose, limits)]
                entries += [Placed(entry, edit.scope, not_before) for entry in made]
            continue
        sums: dict[Scope, dict[str, float]] = {}
        details: dict[Scope, Details | None] = {}
        for edit, dose, _ in run:
            details[edit.scope] = places.details(edit)
            terms = sums.setdefault(edit.scope, {})
            terms[edit.vector] = terms.get(edit.vector, 0.0) + dose.scale
        for scope, terms in sorted(sums.items(), key=lambda item: item[0].order):
            weighted = tuple(sorted((vector, scale) for vector, scale in terms.items() if scale))
            if len(weighted) == 1:
                # A single vector: the row holds it unscaled, so that all its scales share the row.
                entry = Entry(row=RowKey(terms=((weighted[0][0], 1.0),)), c0=weighted[0][1], details=details[scope])
                entries.append(Placed(entry, scope))
            elif weighted:
                entries.append(Placed(Entry(row=RowKey(terms=weighted), c0=1.0, details=details[scope]), scope))
    return entries


def _unit(vector: str) -> RowKey:
    return RowKey(terms=((vector, 1.0),), unit=True)


def _gate_of(edit: Edit, dose: Dose) -> tuple[RowKey, float, float] | None:
    return None if edit.gate is None or dose.gate is None else (_unit(edit.gate.vector), *dose.gate)


def _entry_of(edit: Edit, dose: Dose, details: Details | None) -> Entry:
    base = Entry(row=_unit(edit.vector), gate=_gate_of(edit, dose), details=details)
    match edit.op:
        case Op.ADD:
            return base._replace(row=RowKey(terms=((edit.vector, 1.0),)), c0=dose.scale)
        case Op.ADD_RELATIVE:
            return base._replace(c1=dose.scale)
        case Op.ABLATE:
            return base._replace(c2=-dose.scale)
        case Op.CLAMP | Op.SET:
            lo = -LARGEST if edit.lo is None else edit.lo
            hi = LARGEST if edit.hi is None else edit.hi
            return base._replace(c3=1.0, lo=lo, hi=hi)
    raise AssertionError(f"op {edit.op.value} has parts")


def _of_parts(edit: Edit, dose: Dose, details: Details | None) -> Iterator[Entry]:
    """The entries of an edit with several terms. Those that read x form one group; the others do not depend on x."""
    gate, limits = _gate_of(edit, dose), details or Details()
    parts = [part for part in dose.parts if not part.does_nothing]
    if gate is not None and len(parts) > 1:
        # A gate reads x as well: in one group, all entries test the same x, and the edit applies whole or not at all.
        parts = [part if part.mode else part._replace(mode="read", read=part.write) for part in parts]
    parts.sort(key=lambda part: not part.mode)
    reading = [part for part in parts if part.mode]
    for part in parts:
        numbers = {"c0": part.c0, "c2": part.c2, "c3": part.c3, "lo": part.lo, "hi": part.hi}
        entry = Entry(row=_unit(part.write), gate=gate, details=details, **numbers)  # type: ignore[arg-type]
        if not part.mode:
            yield entry
            continue
        place = LAST if part is reading[-1] else MEMBER
        parallel = place if len(reading) > 1 else 0
        yield entry._replace(read=_unit(part.read), details=limits._replace(mode=MODES[part.mode], parallel=parallel))


def _rows_of(entries: Sequence[Placed]) -> int:
    return max(len(entries), len(keys_of(placed.entry for placed in entries)))
