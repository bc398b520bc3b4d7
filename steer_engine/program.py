"""The compiled form of a spec: per block, which bank rows apply, with which coefficients, at which positions.

A `ProgramTemplate` is compiled once per spec. `at(prompt_len)` returns the `Program` of one request, which travels to
the engine as plain data (ints, floats, digests) inside `SamplingParams.extra_args`. The prefix cache reads the program
too: `block_key` names each edit that touches a KV block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

from steer_engine.capture import CaptureRequest
from steer_engine.edit import Edit, Scope, sha256_of
from steer_engine.spec import Op

PROGRAM_KEY = "_steer_program"
"""Reserved key of `SamplingParams.extra_args` for a program in wire form. A client that writes it is refused."""

KEY_TAG = "steering"
"""First part of our extra key of a KV block."""

SCORE_KEY = "_steer_score"
"""Reserved key of `SamplingParams.extra_args` for a `Score`, set by `steer_engine.LLM.score`."""

Row = tuple["RowKey", int]
"""The content of a bank row, and the block that it belongs to."""

LARGEST = 3.4028234663852886e38
"""An open bound of a clamp: float32's largest number, since JSON has no infinity."""


class RowKey(NamedTuple):
    """What a bank row holds: a weighted sum of vectors at its block, or one vector's unit direction."""

    terms: tuple[tuple[str, float], ...]
    """(vector digest, weight), sorted; one term of weight 1 is the vector as it is."""
    unit: bool = False


class Entry(NamedTuple):
    """Adds g(x) * u to x, with u the row and g(x) = c0 + c1*|x| + c2*<x,u> + c3*(clip(<x,u>, lo, hi) - <x,u>).

    start, end: absolute positions, start <= p < end. gate: a row and bounds on cos(x, row).
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


@dataclass(frozen=True, kw_only=True)
class Program:
    """What one request asks of the workers.

    vectors: digests. identity: (edit digest, start, end) of each edit in canonical order, for the prefix cache.
    """

    sites: tuple[Sites, ...] = ()
    vectors: tuple[str, ...] = ()
    identity: tuple[tuple[str, int, int], ...] = ()
    keep_norm: bool = False
    capture: CaptureRequest | None = None
    score: Score | None = None

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
            identity=tuple((digest, start, end) for digest, start, end in wire["identity"]),
            keep_norm=wire["keep_norm"],
            capture=CaptureRequest.from_wire(capture) if capture else None,
            score=Score.from_wire(score) if score else None,
        )


@dataclass(frozen=True, kw_only=True)
class ProgramTemplate:
    """A program before the prompt length is known: entries with symbolic scopes, blocks with equal entries grouped."""

    sites: tuple[tuple[tuple[int, ...], tuple[tuple[Entry, Scope], ...]], ...]
    edits: tuple[Edit, ...]
    keep_norm: bool = False
    vectors: tuple[str, ...] = field(default=())

    @classmethod
    def compile(cls, edits: Sequence[Edit], *, keep_norm: bool = False) -> ProgramTemplate:
        """Compile `edits`, which are in canonical order."""
        scales_of = [dict(zip(edit.blocks, edit.scales, strict=True)) for edit in edits]
        blocks = sorted({block for edit in edits for block in edit.blocks})
        # Most blocks get the same scales: their entries are computed once.
        blocks_of: dict[tuple[float | None, ...], list[int]] = {}
        doses_at = zip(*(map(scale_at.get, blocks) for scale_at in scales_of), strict=True)
        for block, doses in zip(blocks, doses_at, strict=True):
            blocks_of.setdefault(doses, []).append(block)
        by_entries: dict[tuple[tuple[Entry, Scope], ...], list[int]] = {}
        for doses, alike in blocks_of.items():
            given = [(edit, scale) for edit, scale in zip(edits, doses, strict=True) if scale is not None]
            entries = tuple(_entries_of(given))
            if entries:
                by_entries.setdefault(entries, []).extend(alike)
        named = {edit.vector for edit in edits} | {edit.gate.vector for edit in edits if edit.gate}
        return cls(
            sites=tuple((tuple(sorted(blocks)), entries) for entries, blocks in by_entries.items()),
            edits=tuple(edits),
            keep_norm=keep_norm,
            vectors=tuple(sorted(named)),
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
        return sum(len(blocks) * len(_keys([entry for entry, _ in placed])) for blocks, placed in self.sites)

    def at(self, prompt_len: int) -> Program:
        """The program for a prompt of `prompt_len` tokens, without the edits that cover no position."""
        sites = []
        for blocks, symbolic in self.sites:
            entries = []
            for entry, scope in symbolic:
                start, end = scope.at(prompt_len)
                if start < end:
                    entries.append(_placed(entry, start, end))
            if entries:
                sites.append(Sites(blocks=blocks, entries=tuple(entries)))
        placed = [(edit.digest, *edit.scope.at(prompt_len)) for edit in self.edits]
        return Program(
            sites=tuple(sites),
            vectors=self.vectors if sites else (),
            identity=tuple(item for item in placed if item[1] < item[2]),
            keep_norm=self.keep_norm,
        )


def _entries_of(doses: Sequence[tuple[Edit, float]]) -> list[tuple[Entry, Scope]]:
    """The entries of one block. In a run of ungated adds, those of one scope are summed into one row."""
    entries: list[tuple[Entry, Scope]] = []
    for commutes, run in groupby(doses, key=lambda dose: dose[0].commutes):
        if not commutes:
            entries.extend((_entry_of(edit, scale), edit.scope) for edit, scale in run)
            continue
        sums: dict[Scope, dict[str, float]] = {}
        for edit, scale in run:
            terms = sums.setdefault(edit.scope, {})
            terms[edit.vector] = terms.get(edit.vector, 0.0) + scale
        for scope, terms in sorted(sums.items()):
            weighted = tuple(sorted((vector, scale) for vector, scale in terms.items() if scale))
            if len(weighted) == 1:
                # A single vector: the row holds it unscaled, so that all its scales share the row.
                entries.append((Entry(row=RowKey(terms=((weighted[0][0], 1.0),)), c0=weighted[0][1]), scope))
            elif weighted:
                entries.append((Entry(row=RowKey(terms=weighted), c0=1.0), scope))
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


def _rows_of(entries: Sequence[tuple[Entry, Scope]]) -> int:
    return max(len(entries), len(_keys([entry for entry, _ in entries])))


def _keys(entries: Sequence[Entry]) -> set[RowKey]:
    return {entry.row for entry in entries} | {entry.gate[0] for entry in entries if entry.gate}


def _placed(entry: Entry, start: int, end: int) -> Entry:
    row, c0, c1, c2, c3, lo, hi, _, _, gate = entry
    return Entry(row, c0, c1, c2, c3, lo, hi, start, end, gate)


def _row_to_wire(row: RowKey) -> list[Any]:
    return [[list(term) for term in row.terms], row.unit]


def _row_from_wire(wire: list[Any]) -> RowKey:
    return RowKey(terms=tuple((vector, weight) for vector, weight in wire[0]), unit=wire[1])


def _entry_to_wire(entry: Entry) -> list[Any]:
    gate = [_row_to_wire(entry.gate[0]), entry.gate[1], entry.gate[2]] if entry.gate else None
    return [_row_to_wire(entry.row), list(entry.coefficients), entry.start, entry.end, gate]


def _entry_from_wire(wire: list[Any]) -> Entry:
    row, coefficients, start, end, gate = wire
    c0, c1, c2, c3, lo, hi = coefficients
    gate_entry = (_row_from_wire(gate[0]), gate[1], gate[2]) if gate else None
    return Entry(
        row=_row_from_wire(row), c0=c0, c1=c1, c2=c2, c3=c3, lo=lo, hi=hi, start=start, end=end, gate=gate_entry
    )


def block_key(extra_args: Mapping[str, Any] | None, start: int, end: int) -> tuple[Any, ...] | None:
    """The extra prefix-cache key of the KV block with positions start <= p < end, or None if no edit touches it.

    For each edit that touches the block: (edit digest, first offset, last offset). Equal steering shares a block, and
    unsteered blocks are shared with plain traffic. vLLM calls this several times per block: it is cheap and pure.
    """
    if not extra_args or (program := extra_args.get(PROGRAM_KEY)) is None:
        return None
    touching = tuple(
        (digest, max(first, start) - start, min(stop, end) - 1 - start)
        for digest, first, stop in program["identity"]
        if first < end and stop > start
    )
    if not touching:
        return None
    # A tagged pair, like vLLM's own keys. `keep_norm` changes the result of every edit of the request.
    return (KEY_TAG, (*touching, "keep_norm") if program["keep_norm"] else touching)
