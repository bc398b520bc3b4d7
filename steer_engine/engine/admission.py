"""Admission in the engine core: which vectors all workers hold, and which waiting request gets bank rows."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from steer_engine.program import Row
from steer_engine.settings import PIN_SECONDS, EngineLimits


@dataclass
class _Resident:
    num_bytes: int
    pinned_until: float


@dataclass
class ResidentVectors:
    """The vectors that all workers of an engine hold, least recently used first, within a budget of host memory.

    A vector that a request names is never dropped. Thread-safe: requests are preprocessed in another thread than
    vectors arrive in. budget: bytes per worker; exceeded only while every vector is in use.
    """

    budget: int = field(default_factory=lambda: EngineLimits.from_environment().store_bytes)
    _held: dict[str, _Resident] = field(default_factory=dict)
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
        """All workers hold `digest` now; it is pinned for PIN_SECONDS."""
        with self._lock:
            self._held.pop(digest, None)
            self._held[digest] = _Resident(num_bytes, now + PIN_SECONDS)

    def touch(self, digests: Collection[str], now: float) -> None:
        """Pin vectors again: a request that names them is on its way into the scheduler."""
        with self._lock:
            for digest in digests:
                if digest in self._held:
                    self.put(digest, self._held[digest].num_bytes, now)

    def hold(self, digest: str, now: float) -> bool:
        """Whether `digest` is resident; if so it is pinned again."""
        with self._lock:
            self.touch([digest], now)
            return digest in self._held

    def drop(self, digest: str) -> None:
        with self._lock:
            self._held.pop(digest, None)

    def make_room(self, num_bytes: int, in_use: Collection[str], now: float) -> list[str] | None:
        """Digests to drop before `num_bytes` are added, least recently used first; None if there is not enough room."""
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
