"""Which waiting request may start, where the bank is smaller than what all requests at once could need.

The scheduler's side of the bank. The workers hold the rows of the running requests, and release before they admit, in
the order of the scheduler's steps: what fits here fits there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from typing import Generic, TypeVar

from steer_engine.program import Row

PATIENCE_SECONDS = 1.0
"""No steered request overtakes one of this age that waits for rows: rows in steady use become free for it."""

Request = TypeVar("Request", bound=Hashable)


class BankQueue(Generic[Request]):
    """Lets a request start if the rows of all that run, and its own, fit `num_rows`.

    rows_of: the rows that a request pins while it runs; none for an unsteered one, which never waits here.
    age_of: seconds since a request arrived.
    """

    def __init__(
        self, num_rows: int, rows_of: Callable[[Request], frozenset[Row]], age_of: Callable[[Request], float]
    ) -> None:
        self._num_rows = num_rows
        self._rows_of = rows_of
        self._age_of = age_of
        self._running: set[Request] = set()
        self._users: Counter[Row] = Counter()
        self._num_seen = 0
        self._new_step = True
        self._closed = False

    def begin_step(self) -> None:
        """A new step is planned: requests may have left since the one before."""
        self._new_step = True
        self._closed = False

    def may_start(self, request: Request, running: Sequence[Request]) -> bool:
        """Whether `request` fits beside `running`, which only grows, at its end, while a step is planned."""
        rows = self._rows_of(request)
        if not rows:
            return True
        self._follow(running)
        fits = len(self._users) + sum(row not in self._users for row in rows) <= self._num_rows
        if fits and not self._closed:
            return True
        self._closed = self._closed or self._age_of(request) >= PATIENCE_SECONDS
        return False

    def _follow(self, running: Sequence[Request]) -> None:
        arrived = set(running[self._num_seen :])
        if self._new_step:
            now = set(running)
            for gone in self._running - now:
                self._users.subtract(self._rows_of(gone))
            self._users += Counter()  # rows without users vanish
            arrived = now - self._running
            self._running &= now
            self._new_step = False
        for request in arrived:
            self._users.update(self._rows_of(request))
        self._running |= arrived
        self._num_seen = len(running)
