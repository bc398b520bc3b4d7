"""Admission in the engine core: which vectors the workers store, and which waiting requests may start.

`ResidentVectors` keeps the vectors that all workers store within a budget of host memory. `BankQueue` lets a request
start only if the bank has rows for it.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Generic, TypeVar

from steer_engine.program import Row
from steer_engine.settings import PIN_SECONDS, EngineLimits

PATIENCE_SECONDS = 1.0
"""After this time in the queue, a request that waits for bank rows is not overtaken by other steered requests."""

MAX_LISTED = 1000
"""Vectors that a status report lists. Sorting and sending 100,000 digests would stall a step for 0.1 s."""

Request = TypeVar("Request", bound=Hashable)


@dataclass
class _Resident:
    num_bytes: int
    pinned_until: float


@dataclass
class ResidentVectors:
    """The vectors that all workers of an engine store, least recently used first. Every operation takes constant time,
    except for the vectors that it drops or finds in use.

    A vector that a request names is never dropped. Thread-safe: vLLM preprocesses requests in a different thread than
    the one in which vectors arrive. Times (`now`) are seconds of a monotonic clock.

    budget: bytes per worker. It is exceeded only while every vector is in use.
    """

    budget: int = field(default_factory=lambda: EngineLimits.from_environment().store_bytes)
    num_bytes: int = field(default=0, init=False)
    """Bytes of all vectors, kept up to date."""
    _resident: OrderedDict[str, _Resident] = field(default_factory=OrderedDict)
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def __contains__(self, digest: str) -> bool:
        return digest in self._resident

    def __len__(self) -> int:
        return len(self._resident)

    def digests(self) -> list[str]:
        """The digests of at most MAX_LISTED vectors, the most recently used ones, sorted."""
        with self._lock:
            return sorted(islice(reversed(self._resident), MAX_LISTED))

    def put(self, digest: str, num_bytes: int, now: float) -> None:
        """All workers store `digest` now. It is pinned for PIN_SECONDS."""
        with self._lock:
            self.drop(digest)
            self._resident[digest] = _Resident(num_bytes, now + PIN_SECONDS)
            self.num_bytes += num_bytes

    def touch(self, digests: Collection[str], now: float) -> None:
        """Pin vectors again: a request that names them is about to enter the scheduler."""
        with self._lock:
            for digest in digests:
                if (vector := self._resident.get(digest)) is not None:
                    vector.pinned_until = now + PIN_SECONDS
                    self._resident.move_to_end(digest)

    def pin_if_resident(self, digest: str, now: float) -> bool:
        """Whether `digest` is resident. If it is, it is pinned again."""
        with self._lock:
            self.touch([digest], now)
            return digest in self._resident

    def drop(self, digest: str) -> None:
        with self._lock:
            if (vector := self._resident.pop(digest, None)) is not None:
                self.num_bytes -= vector.num_bytes

    def make_room(self, num_bytes: int, in_use: Collection[str], now: float) -> list[str] | None:
        """Digests to drop before `num_bytes` are added, least recently used first; None if there is not enough room."""
        victims = []
        with self._lock:
            excess = self.num_bytes + num_bytes - self.budget
            for digest, vector in self._resident.items():
                # The order is that of the pins: all vectors after a pinned one are pinned, too.
                if excess <= 0 or vector.pinned_until > now:
                    break
                if digest not in in_use:
                    victims.append(digest)
                    excess -= vector.num_bytes
        return victims if excess <= 0 else None


class BankQueue(Generic[Request]):
    """Lets a request start if its rows and those of all running requests fit in `num_rows`.

    rows_of: the rows that a request pins while it runs. An unsteered request has none and never waits here.
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
        """The scheduler plans a new step. Requests may have finished since the last one."""
        self._new_step = True
        self._closed = False

    def may_start(self, request: Request, running: Sequence[Request]) -> bool:
        """Whether `request` fits beside `running`. While a step is planned, `running` only grows at its end."""
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
        """Bring the count of users per row in sync with `running`."""
        started = set(running[self._num_seen :])
        if self._new_step:
            now = set(running)
            for finished in self._running - now:
                self._users.subtract(self._rows_of(finished))
            self._users += Counter()  # removes rows without users
            started = now - self._running
            self._running &= now
            self._new_step = False
        for request in started:
            self._users.update(self._rows_of(request))
        self._running |= started
        self._num_seen = len(running)
