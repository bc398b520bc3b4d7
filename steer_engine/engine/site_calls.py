"""Counts the op calls of an engine's first steps: what the startup probe saw must be what real steps do."""

from __future__ import annotations

from collections.abc import Sequence

from steer_engine.errors import UnsupportedEngineError
from steer_engine.site import Site, describe_point, site_of


class SiteCalls:
    """Counts how often the op of each site runs, in the first real steps of an engine: it must be once a step.

    A model can pass the startup probe and still run another path in a real step, for example one kernel in place of a
    block. A replayed graph runs no Python: its ops are counted when it is captured, with those of the dummy runs before
    the first step.

    points: the armed points, in the order of the tables. can_replay: the engine replays captured graphs. num_steps: how
    many real steps are counted.
    """

    def __init__(self, points: Sequence[int], *, can_replay: bool, num_steps: int = 32) -> None:
        self._points = tuple(points)
        self._can_replay = can_replay
        self._left = num_steps
        self._counts = [0] * len(self._points)
        self._in_step = False
        self._began = False
        self._captured = False

    @property
    def done(self) -> bool:
        """Whether enough steps have been counted."""
        return self._left == 0 and not self._in_step

    def count(self, site: int) -> None:
        self._counts[site] += 1

    def begin_step(self) -> None:
        """A real step is about to run. Checks the step before it, or the dummy runs if it is the first.

        Raises:
            UnsupportedEngineError: see `end_step`.
        """
        self.end_step()
        if not self._began:
            self._began, most = True, max(self._counts, default=0)
            self._captured = most > 0
            self._check(most, "dummy runs before the first step")
        self._counts = [0] * len(self._points)
        self._in_step = True

    def end_step(self) -> None:
        """The forward pass of the step has run. Does nothing outside of a step.

        Raises:
            UnsupportedEngineError: the op of a site did not run exactly once. The message names the block.
        """
        if not self._in_step:
            return
        self._in_step = False
        self._left = max(0, self._left - 1)
        if not any(self._counts) and self._can_replay and self._captured:
            return
        self._check(1, "a step")

    def _check(self, expected: int, when: str) -> None:
        wrong = {point: count for point, count in zip(self._points, self._counts, strict=True) if count != expected}
        if not wrong:
            return
        sites = dict.fromkeys(site.value for point in wrong if (site := site_of(point)) is not Site.BLOCK)
        remedy = "Leave them out of --steering-blocks"
        if sites:
            remedy += f", or {' and '.join(sites)} out of --steering-sites"
        named = ", ".join(f"{describe_point(point)} ({count})" for point, count in wrong.items())
        raise UnsupportedEngineError(
            f"In {when}, edits must run {expected} times at each armed block, and ran otherwise at: {named[:400]}. The "
            f"model does not call these blocks as it did at startup. {remedy}, or start the model unarmed."
        )
