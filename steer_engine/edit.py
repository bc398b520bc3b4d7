"""One edit with all names resolved, where and when it applies, and the canonical order of a list of edits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from math import fsum, inf, log2
from typing import Any, NamedTuple

from steer_engine.site import Site, points_at
from steer_engine.spec import Op
from steer_engine.trigger import NO_END, Trigger

EDIT_FORMAT = "steer-engine/edit/1"
"""Part of every edit digest. Increase it when the meaning of an operation changes."""


class Bound(NamedTuple):
    """A token position, counted from the start or from the end of the prompt."""

    from_end: bool
    offset: int

    def at(self, prompt_len: int) -> int:
        return max(0, self.offset + (prompt_len if self.from_end else 0))


class Scope(NamedTuple):
    """Token positions start <= p < end, in the windows of `trigger` if there is one, and outside those of `exclude`.

    Bounds may depend on the prompt length P, which is not known yet.
    """

    start: Bound
    end: Bound
    trigger: Trigger | None = None
    exclude: Trigger | None = None

    @classmethod
    def span(cls, start: int | None, end: int | None) -> Scope:
        """Bounds as in a Python slice: negative numbers count from P, None is open."""
        first = Bound(False, 0) if start is None else Bound(start < 0, start)
        last = Bound(False, NO_END) if end is None else Bound(end < 0, end)
        return cls(first, last)

    @property
    def wire(self) -> list[Any]:
        """Plain data, for digests."""
        span = [[self.start.from_end, self.start.offset], [self.end.from_end, self.end.offset]]
        if self.trigger is None and self.exclude is None:
            return span
        return [*span, *(trigger.to_wire() if trigger else None for trigger in (self.trigger, self.exclude))]

    @property
    def order(self) -> tuple[Any, ...]:
        """A sorting key."""
        return (self.start, self.end, self.trigger or (), self.exclude or ())

    @property
    def is_empty(self) -> bool:
        """Whether the scope is empty for every prompt length."""
        if self.start.from_end == self.end.from_end:
            return self.start.offset >= self.end.offset
        return not self.end.from_end and self.end.offset <= 0

    @property
    def may_cover_answer(self) -> bool:
        """Whether a prompt length exists for which the span has a position that selects a generated token."""
        # From P-1 on. A bound that counts from the start is beyond a short prompt.
        return self.end.offset >= 0 if self.end.from_end else self.end.offset > 0

    def at(self, prompt_len: int) -> tuple[int, int]:
        """Absolute [start, end) for a prompt of `prompt_len` tokens."""
        return min(self.start.at(prompt_len), NO_END), min(self.end.at(prompt_len), NO_END)


LARGEST = 3.4028234663852886e38
"""An open bound: float32's largest number, since JSON has no infinity."""

ALL = Scope.span(None, None)
PROMPT = Scope(Bound(False, 0), Bound(True, 0))
GENERATION = Scope.span(-1, None)
"""From position P-1 on: every position whose output selects a generated token."""
LAST_PROMPT_TOKEN = Scope(Bound(True, -1), Bound(True, 0))


class Schedule(NamedTuple):
    """The share of an edit over its window: 1 at the first token, `to` from token `over` on."""

    exponential: bool
    over: int
    to: float

    @property
    def slope(self) -> float:
        """Change per token: of the share if linear, else of its binary logarithm."""
        return (log2(self.to) if self.exponential else self.to - 1.0) / self.over


class Measured(NamedTuple):
    """A condition on the device: it holds if the sum of its numbers, or the largest, is strictly between two bounds."""

    low: float
    high: float
    largest: bool

    def holds(self, number: float) -> bool:
        return self.low < number < self.high


class Condition(NamedTuple):
    """A number about the prompt, measured before the edits of its blocks, and the bounds strictly between which it
    must be.

    vector: digest. site: what is measured in each block. at: "last_prompt_token" and "mean_prompt" take means over
    positions and blocks, "max_prompt" the largest. The defaults of the bounds exclude nothing.
    """

    vector: str
    blocks: tuple[int, ...]
    measure: str
    at: str
    above: float | None = None
    below: float | None = None
    site: Site = Site.BLOCK

    @property
    def points(self) -> tuple[int, ...]:
        """Where it is measured, in the order of `blocks` (see `site`)."""
        return points_at(self.blocks, self.site)

    @property
    def wire(self) -> list[Any]:
        """Plain data, for digests."""
        return list(self[:-1]) if self.site is Site.BLOCK else list(self)

    def measured_at(self, prompt_len: int) -> Measured:
        """The bounds of the sum (or of the largest number) for a prompt."""
        count = self.numbers(prompt_len)
        low = -inf if self.above is None else self.above * count
        high = inf if self.below is None else self.below * count
        return Measured(low, high, self.at == "max_prompt")

    def report(self) -> dict[str, Any]:
        """This condition in the `steering` object of an answer."""
        bounds = {"above": self.above, "below": self.below}
        body = {"vector": self.vector, "blocks": list(self.blocks), "measure": self.measure, "at": self.at}
        if self.site is not Site.BLOCK:
            body["site"] = self.site.value
        return body | {key: bound for key, bound in bounds.items() if bound is not None}

    def numbers(self, prompt_len: int) -> int:
        """How many numbers are added up for a prompt; 1 where the largest is kept."""
        if self.at == "max_prompt":
            return 1
        return len(self.blocks) * (prompt_len if self.at == "mean_prompt" else 1)


class When(NamedTuple):
    """Apply an edit only if all (or `any`) of the conditions hold. Decided once per request, at `decided_at`."""

    conditions: tuple[Condition, ...]
    any: bool = False

    @property
    def decided_at(self) -> int:
        """The last block that is measured. The edit applies from position P-1 on at later blocks, and from P on at this
        block and earlier ones: they may have been computed when the decision is made. That counts for all sites of the
        block, because some models compute attention and MLP side by side."""
        return max(condition.blocks[-1] for condition in self.conditions)

    def holds(self, held: Sequence[bool]) -> bool:
        """held: of each condition, in order."""
        return any(held) if self.any else all(held)


@dataclass(frozen=True, kw_only=True)
class GateBounds:
    """Apply an edit only where low <= cos(x, vector) <= high; with `dot`, <x, vector / |vector|> instead.

    vector: digest. bounds: per block of the edit, (low, high).
    """

    vector: str
    bounds: tuple[tuple[float, float], ...]
    dot: bool = False


class Part(NamedTuple):
    """One of the terms that an edit adds at a block: g(x) * w. All terms read the x before the edit.

    write: digest; w is its unit direction. read: digest; r is its unit direction, empty without a mode.
    mode: "" adds c0 * w. The others are those of `steer_kernels.tables`: "read", "jump" and "plane".
    """

    mode: str
    read: str
    write: str
    c0: float = 0.0
    c2: float = 0.0
    c3: float = 0.0
    lo: float = -LARGEST
    hi: float = LARGEST

    @property
    def does_nothing(self) -> bool:
        return not (self.c0 or self.c2 or self.c3)


class Growth(NamedTuple):
    """|x'| <= factor * |x| + amount, for every share from 0 to 1 of an edit at one block."""

    factor: float = 1.0
    amount: float = 0.0


class Dose(NamedTuple):
    """What an edit does at one block, apart from where it applies: its scale, or its parts; and the gate's bounds."""

    scale: float
    parts: tuple[Part, ...] = ()
    gate: tuple[float, float] | None = None


@dataclass(frozen=True, kw_only=True)
class Edit:
    """One operation at one site of `blocks`.

    vector: digest of the file. toward: of the second one of a rotation.
    scales: per block, the factor on the vector (add) or on the operation (add_relative, ablate).
    lo, hi: bounds of the component along the vector (clamp; both equal the target for set).
    parts: per block, the terms of an edit with several; such an edit uses neither scales nor bounds.
    growth: per block, what its parts may do to the norm of x.
    schedule: how the edit changes over its window. when: decides whether it applies at all.
    """

    op: Op
    vector: str
    blocks: tuple[int, ...]
    scales: tuple[float, ...]
    scope: Scope = ALL
    lo: float | None = None
    hi: float | None = None
    gate: GateBounds | None = None
    schedule: Schedule | None = None
    when: When | None = None
    toward: str | None = None
    parts: tuple[tuple[Part, ...], ...] = ()
    growth: tuple[Growth, ...] = ()
    site: Site = Site.BLOCK

    @cached_property
    def points(self) -> tuple[int, ...]:
        """The edited points, in the order of `blocks` (see `site`)."""
        return points_at(self.blocks, self.site)

    @cached_property
    def doses(self) -> dict[int, Dose]:
        """By point."""
        parts = self.parts or ((),) * len(self.blocks)
        gates = self.gate.bounds if self.gate else (None,) * len(self.blocks)
        return dict(zip(self.points, map(Dose, self.scales, parts, gates), strict=True))

    @property
    def commutes(self) -> bool:
        """Whether the edit may be reordered and summed with others: adds that always apply in full."""
        return self.op is Op.ADD and self.gate is None and self.schedule is None and self.when is None

    @property
    def peak_scales(self) -> tuple[float, ...]:
        """Per block, the scale where the schedule makes it largest."""
        share = 1.0 if self.schedule is None else max(1.0, abs(self.schedule.to))
        return self.scales if share == 1.0 else tuple(share * scale for scale in self.scales)

    @property
    def vectors(self) -> set[str]:
        """Digests of all vectors that the edit reads."""
        gate = {self.gate.vector} if self.gate else set()
        parts = [part for parts in self.parts for part in parts]
        rows = {digest for part in parts for digest in (part.read, part.write) if digest} or {self.vector}
        return rows | gate | {condition.vector for condition in (self.when.conditions if self.when else ())}

    @property
    def does_nothing(self) -> bool:
        """Whether the scope is empty, or all scales are 0."""
        if self.parts and all(part.does_nothing for parts in self.parts for part in parts):
            return True
        scaled = self.op in (Op.ADD, Op.ADD_RELATIVE, Op.ABLATE)
        return self.scope.is_empty or (scaled and not any(self.scales))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of everything that affects the output except the scope, which cache keys and specs add themselves."""
        gate: list[Any] | None = None
        if self.gate is not None:
            gate = [self.gate.vector, *self.gate.bounds[0]]
            if self.gate.dot:
                gate = [self.gate.vector, "dot", self.gate.bounds]
        # The parts say which rows of a file they read; the rest of it has no effect.
        vector = "" if self.parts else self.vector
        content = [EDIT_FORMAT, self.op.value, vector, self.blocks, self.scales, self.lo, self.hi, gate]
        if self.parts:
            content.append(["parts", self.parts])
        if self.schedule is not None:
            # It counts from the first token of a window, which is not seen in the blocks of tokens that follow.
            content.append(["schedule", *self.schedule, self.scope.wire])
        if self.when is not None:
            content.append(["when", self.when.any, *(condition.wire for condition in self.when.conditions)])
        if self.site is not Site.BLOCK:
            content.append(["site", self.site.value])
        return sha256_of(content)


def canonical_order(edits: Sequence[Edit]) -> tuple[Edit, ...]:
    """Edits with the same effect in a unique form.

    Edits that do nothing are removed. Adds that follow each other are summed and sorted.
    """
    result: list[Edit] = []
    # Before grouping, because an edit without effect must not separate adds that can be summed.
    effective = (edit for edit in edits if not edit.does_nothing)
    for commutes, run in groupby(effective, key=lambda edit: edit.commutes):
        group = list(run)
        result.extend(_summed(group) if commutes else group)
    return tuple(result)


def _summed(adds: Sequence[Edit]) -> Iterator[Edit]:
    """One add per vector, scope and site, without the blocks at which the scales add up to 0."""
    if len(adds) == 1 and all(adds[0].scales):
        yield adds[0]
        return
    scales: dict[tuple[str, Scope, Site], dict[int, list[float]]] = {}
    for add in adds:
        at_block = scales.setdefault((add.vector, add.scope, add.site), {})
        for block, scale in zip(add.blocks, add.scales, strict=True):
            at_block.setdefault(block, []).append(scale)
    ordered = sorted(scales.items(), key=lambda item: (item[0][0], item[0][1].order, list(Site).index(item[0][2])))
    for (vector, scope, site), at_block in ordered:
        # fsum rounds once, so the order of the scales does not affect the sum.
        sums = {block: total for block in sorted(at_block) if (total := fsum(at_block[block]))}
        if sums:
            yield Edit(
                op=Op.ADD, vector=vector, blocks=tuple(sums), scales=tuple(sums.values()), scope=scope, site=site
            )


def sha256_of(content: Any) -> str:
    """`sha256:<hex>` of the canonical JSON text of plain data."""
    return "sha256:" + hashlib.sha256(_CANONICAL_JSON.encode(content).encode()).hexdigest()


_CANONICAL_JSON = json.JSONEncoder(separators=(",", ":"), allow_nan=False)
