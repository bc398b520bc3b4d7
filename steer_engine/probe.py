"""Probes of a request with all names resolved, and what the engine needs of them."""

from __future__ import annotations

from math import exp, inf, log
from typing import Any, NamedTuple

from steer_engine.edit import Scope
from steer_engine.fields import Finite
from steer_engine.site import Site, points_at


class Platt(NamedTuple):
    """A calibrated probability of a dot product z: 1 / (1 + exp(-(a*z + b))) (Platt, 1999)."""

    a: Finite
    b: Finite

    def probability(self, dot: float) -> float:
        exponent = self.a * dot + self.b
        # The form that cannot overflow.
        return 1 / (1 + exp(-exponent)) if exponent >= 0 else exp(exponent) / (1 + exp(exponent))

    def dot(self, probability: float) -> float:
        """The dot product with this probability, which is between 0 and 1. a must not be 0."""
        return (log(probability / (1 - probability)) - self.b) / self.a


class Probe(NamedTuple):
    """A number per token and block.

    vector: digest. measure: "dot" or "cosine". platt: of each block, where the client gets a probability instead of the
    dot product. returns: "tokens", "summary" or "none".
    """

    name: str
    vector: str
    blocks: tuple[int, ...]
    measure: str
    scope: Scope
    after: bool
    returns: str
    platt: tuple[Platt, ...] = ()
    site: Site = Site.BLOCK

    @property
    def points(self) -> tuple[int, ...]:
        """Where it measures, in the order of `blocks` (see `site`)."""
        return points_at(self.blocks, self.site)

    @property
    def measured(self) -> Probe:
        """What the engine measures, without what only the answer needs."""
        return self._replace(name="", returns="", platt=())

    def report(self) -> dict[str, Any]:
        """This probe in the `steering` object of an answer."""
        measure = "probability" if self.platt else self.measure
        where = {"vector": self.vector, "blocks": list(self.blocks), "measure": measure, "after": self.after}
        if self.site is not Site.BLOCK:
            where["site"] = self.site.value
        return {"name": self.name} | where


class StopRule(NamedTuple):
    """End the answer when the number in `column` was strictly between two bounds for `tokens` tokens in a row."""

    probe: str
    column: int
    low: float
    high: float
    tokens: int

    def holds(self, number: float) -> bool:
        return self.low < number < self.high


class ProbePlan(NamedTuple):
    """What the engine measures for one request. A token row has a number per probe and block, probe by probe.

    blocks: the points of each probe (see `site`). start: the first position that is measured; the prompt's last one at
    the latest. num_watched: so many of the probes, at the end, are the operator's monitors, with a block each.
    """

    blocks: tuple[tuple[int, ...], ...]
    start: int
    stops: tuple[StopRule, ...] = ()
    num_watched: int = 0

    @property
    def num_own_columns(self) -> int:
        """The columns of the request's own probes, which come first."""
        return self.num_columns - self.num_watched

    @property
    def num_columns(self) -> int:
        return sum(len(blocks) for blocks in self.blocks)

    def columns(self, probe: int) -> dict[int, int]:
        """By point, the place of a probe's number in its token's row."""
        first = sum(len(blocks) for blocks in self.blocks[:probe])
        return {block: first + place for place, block in enumerate(self.blocks[probe])}

    def to_wire(self) -> list[Any]:
        """Plain data."""
        return [[list(blocks) for blocks in self.blocks], self.start, [list(stop) for stop in self.stops]]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> ProbePlan:
        blocks, start, stops = wire
        return cls(tuple(tuple(each) for each in blocks), start, tuple(StopRule(*stop) for stop in stops))


def bounds_on_dot(platt: Platt, above: float | None, below: float | None) -> tuple[float, float]:
    """The open interval of dot products whose probability is above and below the bounds."""
    low = -inf if above is None else platt.dot(above)
    high = inf if below is None else platt.dot(below)
    if platt.a > 0:
        return low, high
    return (-inf if below is None else high), (inf if above is None else low)
