"""One edit with every name resolved, and the token positions that it covers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import fsum
from typing import Any

from steer_engine.spec import Op

EDIT_FORMAT = "steer-engine/edit/1"
"""Enters every edit digest: raise it when the meaning of an operation changes."""

NO_END = 2**31 - 1
"""End of a scope that is open: positions are int32 on the device."""


@dataclass(frozen=True, order=True)
class Bound:
    """A token position, counted from the start or from the end of the prompt."""

    from_end: bool
    offset: int

    def at(self, prompt_len: int) -> int:
        return max(0, self.offset + (prompt_len if self.from_end else 0))


@dataclass(frozen=True, order=True)
class Scope:
    """Positions start <= p < end, before the prompt's length P is known."""

    start: Bound
    end: Bound

    @classmethod
    def span(cls, start: int | None, end: int | None) -> Scope:
        """As a Python slice of the prompt: negative numbers count from P, None is open."""
        first = Bound(False, 0) if start is None else Bound(start < 0, start)
        last = Bound(False, NO_END) if end is None else Bound(end < 0, end)
        return cls(first, last)

    @property
    def wire(self) -> list[list[int | bool]]:
        """Plain data, for digests."""
        return [[self.start.from_end, self.start.offset], [self.end.from_end, self.end.offset]]

    @property
    def is_empty(self) -> bool:
        """Covers no position of any request, however long its prompt."""
        if self.start.from_end == self.end.from_end:
            return self.start.offset >= self.end.offset
        return not self.end.from_end and self.end.offset <= 0

    def at(self, prompt_len: int) -> tuple[int, int]:
        """Absolute [start, end) for a prompt of `prompt_len` tokens."""
        return min(self.start.at(prompt_len), NO_END), min(self.end.at(prompt_len), NO_END)


ALL = Scope.span(None, None)
PROMPT = Scope(Bound(False, 0), Bound(True, 0))
GENERATION = Scope.span(-1, None)
"""From position P-1 on: every position whose output chooses a generated token."""


@dataclass(frozen=True, kw_only=True)
class GateBounds:
    """Apply an edit only where min_cos <= cos(x, vector) <= max_cos."""

    vector: str
    min_cos: float = -2.0
    max_cos: float = 2.0


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One operation at the sites of `blocks`, its vector named by content.

    scales: per block, the factor on the vector as it is (add) or on the operation (add_relative, ablate).
    lo, hi: bounds on the component along v (clamp; equal for set).
    """

    op: Op
    vector: str
    blocks: tuple[int, ...]
    scales: tuple[float, ...]
    scope: Scope = ALL
    lo: float | None = None
    hi: float | None = None
    gate: GateBounds | None = None

    @property
    def commutes(self) -> bool:
        """Ungated adds may be reordered among themselves, and summed."""
        return self.op is Op.ADD and self.gate is None

    @property
    def does_nothing(self) -> bool:
        scaled = self.op in (Op.ADD, Op.ADD_RELATIVE, Op.ABLATE)
        return self.scope.is_empty or (scaled and not any(self.scales))

    @cached_property
    def digest(self) -> str:
        """SHA-256 over all that changes the output but the positions, which block keys and specs carry beside it."""
        gate = [self.gate.vector, self.gate.min_cos, self.gate.max_cos] if self.gate else None
        return sha256_of([EDIT_FORMAT, self.op.value, self.vector, self.blocks, self.scales, self.lo, self.hi, gate])


def canonical_order(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """The same effect in one form: edits that do nothing vanish, adds that meet are summed and sorted."""
    result: list[Edit] = []
    # First of all what does nothing goes: it must not stand between adds that could be summed.
    effective = (edit for edit in edits if not edit.does_nothing)
    for commutes, run in groupby(effective, key=lambda edit: edit.commutes):
        meeting = list(run)
        result.extend(_summed(meeting) if commutes else meeting)
    return tuple(result)


def _summed(adds: Iterable[Edit]) -> Iterator[Edit]:
    """One add per vector and scope, with the blocks at which something is left of the sum."""
    scales: dict[tuple[str, Scope], dict[int, list[float]]] = {}
    for add in adds:
        at_block = scales.setdefault((add.vector, add.scope), {})
        for block, scale in zip(add.blocks, add.scales, strict=True):
            at_block.setdefault(block, []).append(scale)
    for (vector, scope), at_block in sorted(scales.items()):
        # fsum rounds once, so that the order of the summands does not show.
        sums = {block: total for block in sorted(at_block) if (total := fsum(at_block[block]))}
        if sums:
            yield Edit(op=Op.ADD, vector=vector, blocks=tuple(sums), scales=tuple(sums.values()), scope=scope)


def sha256_of(content: Any) -> str:
    """`sha256:<hex>` of the canonical JSON text of plain data."""
    text = json.dumps(content, separators=(",", ":"), allow_nan=False)
    return "sha256:" + hashlib.sha256(text.encode()).hexdigest()
