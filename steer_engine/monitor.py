"""Monitors: probes of the operator on all traffic. What a flag asks for, and what the engine measures of every request.

A monitor never enters a request's own program, digest or answer. The engine adds it when a request gets a slot, and its
numbers go to the metrics only.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import isfinite
from typing import Any, NamedTuple

from steer_engine.edit import GENERATION
from steer_engine.errors import UnsupportedEngineError
from steer_engine.fields import parse_blocks, shown
from steer_engine.probe import Platt, Probe, ProbePlan
from steer_engine.program import Entry, Program, Row, Sites
from steer_engine.settings import MONITORS_ENV, EngineLimits
from steer_engine.site import Site, block_of, describe_point, points_at, site_of
from steer_engine.template import ProgramTemplate

FLAG = "--steering-monitor"
FORM = "NAME, or NAME=VECTOR:BLOCKS:MEASURE:above=NUMBER"
EXAMPLE = "toxic=toxicity:14:cosine:above=0.2"

_FORM = re.compile(
    r"(?P<name>[\w.-]{1,64})"
    r"(?:=(?P<vector>sha256:[0-9a-f]{64}|[\w.-]{1,128}))?"
    r"(?::(?P<blocks>\d{1,5}(?:-\d{1,5})?))?"
    r"(?::(?P<measure>cosine|dot|probability))?"
    r"(?::above=(?P<above>[^:\s]{1,40}))?",
    re.ASCII,
)


class MonitorSpec(NamedTuple):
    """One `--steering-monitor`, as it is written. None: not given; the vector's file decides, or there is none."""

    text: str
    name: str
    vector: str
    blocks: tuple[int, ...] | None
    measure: str | None
    above: float | None

    @classmethod
    def parse(cls, text: str) -> MonitorSpec:
        """Raises UnsupportedEngineError if `text` does not have the form, or a number in it is not valid."""
        match = _FORM.fullmatch(text)
        if match is None:
            raise UnsupportedEngineError(
                f"{FLAG} {shown(text)} is not valid; write {FORM}, such as {EXAMPLE}. Every part behind the name may "
                "be left out."
            )
        try:
            blocks = parse_blocks(match["blocks"]) if match["blocks"] else None
            above = float(match["above"]) if match["above"] else None
        except ValueError as error:
            raise UnsupportedEngineError(f"{FLAG} {shown(text)}: {error}") from None
        if above is not None and not isfinite(above):
            raise UnsupportedEngineError(f"{FLAG} {shown(text)}: above must be a finite number.")
        return cls(text, match["name"], match["vector"] or match["name"], blocks, match["measure"], above)

    @property
    def num_numbers(self) -> int:
        """Numbers per token: one for each block. Without blocks it is the one where the probe is best."""
        return len(self.blocks or (0,))


def parse_monitors(texts: Sequence[str], limits: EngineLimits) -> tuple[MonitorSpec, ...]:
    """Raises UnsupportedEngineError for a wrong form, a name that is used twice, or too many."""
    specs = tuple(MonitorSpec.parse(text) for text in texts)
    names = [spec.name for spec in specs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UnsupportedEngineError(f"{FLAG}: the name {twice[0]!r} is used twice; give each monitor its own.")
    count = sum(spec.num_numbers for spec in specs)
    if count > limits.max_monitors:
        raise UnsupportedEngineError(
            f"{FLAG}: the monitors give {count} numbers per token, one for each block; at most {limits.max_monitors} "
            "are allowed (max_monitors). Watch fewer blocks, or raise it: --steering-limit max_monitors=N."
        )
    return specs


def monitors_of_environment() -> tuple[MonitorSpec, ...]:
    """The monitors that this server was started with. Raises UnsupportedEngineError as `parse_monitors`."""
    texts = os.environ.get(MONITORS_ENV, "").split()
    return parse_monitors(texts, EngineLimits.from_environment()) if texts else ()


def monitor_room() -> int:
    """Numbers per token of all monitors: so many entries per block, columns and bank rows are reserved for them."""
    return sum(spec.num_numbers for spec in monitors_of_environment())


class Monitor(NamedTuple):
    """A number that is watched on all traffic.

    vector: digest. measure: "cosine", "dot" or "probability"; platt: for the last. above: the threshold, in the unit of
    the measure; None = no share is counted. site: of the vector.
    """

    name: str
    vector: str
    block: int
    measure: str
    platt: Platt | None = None
    above: float | None = None
    site: Site = Site.BLOCK

    @property
    def point(self) -> int:
        """Where it measures (see `site`)."""
        return points_at((self.block,), self.site)[0]

    def __str__(self) -> str:
        above = "" if self.above is None else f", above {self.above:g}"
        return f"{self.name}: {self.measure} at block {describe_point(self.point)}{above} ({self.vector})"


@dataclass(frozen=True, kw_only=True)
class Watched:
    """What an engine measures at the generated tokens of every request.

    numbers: (vector digest, point, "cosine" or "dot") of each number, in order.
    """

    numbers: tuple[tuple[str, int, str], ...]

    @classmethod
    def of(cls, monitors: Sequence[Monitor]) -> Watched:
        return cls(
            numbers=tuple(
                (each.vector, each.point, "cosine" if each.measure == "cosine" else "dot") for each in monitors
            )
        )

    def to_wire(self) -> list[Any]:
        """Plain data."""
        return [list(number) for number in self.numbers]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> Watched:
        return cls(numbers=tuple((vector, point, measure) for vector, point, measure in wire))

    @property
    def vectors(self) -> frozenset[str]:
        return frozenset(vector for vector, _, _ in self.numbers)

    @cached_property
    def rows(self) -> tuple[Row, ...]:
        """The bank rows of the numbers."""
        return tuple(sorted(self._template.at(1).bank_rows))

    @cached_property
    def _template(self) -> ProgramTemplate:
        probes = [
            Probe("", vector, (block_of(point),), measure, GENERATION, after=False, returns="", site=site_of(point))
            for vector, point, measure in self.numbers
        ]
        return ProgramTemplate.compile((), probes=probes)

    def plan(self, own: ProbePlan | None, prompt_len: int) -> ProbePlan:
        """The plan of a request whose own probes have the plan `own`: our numbers come behind its own."""
        own = own or ProbePlan((), prompt_len - 1)
        points = tuple((point,) for _, point, _ in self.numbers)
        return own._replace(blocks=own.blocks + points, num_watched=len(points))

    def added_to(self, program: Program | None, prompt_len: int) -> Program:
        """`program`, which also measures our numbers, before its edits. None: of an unsteered request."""
        ours = self._template.at(prompt_len)
        plan = self.plan(None if program is None else program.probes, prompt_len)
        if program is None:
            return replace(ours, probes=plan)
        first = len(plan.blocks) - plan.num_watched
        entries_of = {block: site.entries for site in program.sites for block in site.blocks}
        for site in ours.sites:
            renumbered = tuple(_renumbered(entry, first) for entry in site.entries)
            for block in site.blocks:
                entries_of[block] = _before_edits(entries_of.get(block, ()), renumbered)
        blocks_of: dict[tuple[Entry, ...], list[int]] = {}
        for block, entries in sorted(entries_of.items()):
            blocks_of.setdefault(entries, []).append(block)
        sites = tuple(Sites(blocks=tuple(blocks), entries=entries) for entries, blocks in blocks_of.items())
        return replace(program, sites=sites, probes=plan)


def _renumbered(entry: Entry, first: int) -> Entry:
    assert entry.details is not None
    return entry._replace(details=entry.details._replace(probe=entry.details.probe + first))


def _before_edits(entries: tuple[Entry, ...], ours: tuple[Entry, ...]) -> tuple[Entry, ...]:
    """`ours` behind what is measured before the edits of a block."""
    early = 0
    while early < len(entries) and (details := entries[early].details) and details.measure and not details.late:
        early += 1
    return (*entries[:early], *ours, *entries[early:])
