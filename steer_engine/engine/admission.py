"""Which vectors an engine holds on all its workers, within a budget of host memory. One per engine core."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from steer_engine.program import Row
from steer_engine.settings import EngineLimits

PIN_SECONDS = 60.0
"""How long a vector stays after it was shipped or named: the scheduler may not know its request yet."""


@dataclass
class _Held:
    num_bytes: int
    pinned_until: float


@dataclass
class Resident:
    """Digests in the order of their last use. What a running request names is never given up. Thread-safe: requests are
    prepared in another thread than vectors arrive in.

    budget: bytes of vectors in host memory of each worker; more is taken only while everything else is in use.
    """

    budget: int = field(default_factory=lambda: EngineLimits.from_environment().store_bytes)
    _held: dict[str, _Held] = field(default_factory=dict)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def __contains__(self, digest: str) -> bool:
        return digest in self._held

    def digests(self) -> list[str]:
        with self._lock:
            return sorted(self._held)

    @property
    def num_bytes(self) -> int:
        with self._lock:
            return sum(held.num_bytes for held in self._held.values())

    def put(self, digest: str, num_bytes: int, now: float) -> None:
        """All workers hold `digest` now; it is kept for its request for a while."""
        with self._lock:
            self._held.pop(digest, None)
            self._held[digest] = _Held(num_bytes, now + PIN_SECONDS)

    def touch(self, digests: Collection[str], now: float) -> None:
        """A request that names these is on its way into the scheduler."""
        with self._lock:
            for digest in digests:
                if digest in self._held:
                    self.put(digest, self._held[digest].num_bytes, now)

    def hold(self, digest: str, now: float) -> bool:
        """Keep `digest` for a while more, if it is here."""
        with self._lock:
            self.touch([digest], now)
            return digest in self._held

    def drop(self, digest: str) -> None:
        with self._lock:
            self._held.pop(digest, None)

    def make_room(self, num_bytes: int, in_use: Collection[str], now: float) -> list[str] | None:
        """Digests to give up before `num_bytes` more are taken, least recently used first; None if it can't be done."""
        excess = self.num_bytes + num_bytes - self.budget
        victims = []
        with self._lock:
            for digest, held in self._held.items():
                if excess <= 0:
                    break
                if digest not in in_use and held.pinned_until <= now:
                    victims.append(digest)
                    excess -= held.num_bytes
        return victims if excess <= 0 else None


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
