"""Gates that a request passes in the API process: the drain gate of a shutdown, and the limits on the bank queue and on
the bytes of all bodies."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Awaitable, Callable

from steer_engine.errors import CapacityError

RETRY_AFTER_SECONDS = 5.0
SHUTTING_DOWN = "This server is shutting down; send the request to another one."

REFRESH_SECONDS = 0.25
"""Maximum age of the engine's queue length. The engine answers between two steps, so it is not asked per request."""

QUEUE_RETRY_SECONDS = 2.0

BODY_RETRY_SECONDS = 2.0

SMALL_BODY_BYTES = 2**18
"""A body up to this size is counted, but never refused: large ones cannot keep ordinary requests out."""


class DrainGate:
    """Counts running requests. Once closed, they finish and new requests get 503.

    Requests come and go on the event loop; the shutdown closes the gate and waits in another thread. The lock makes a
    request either counted or refused.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._running = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def running(self) -> int:
        return self._running

    def close(self) -> None:
        with self._lock:
            self._closed = True

    def check_open(self) -> None:
        """Raise CapacityError once the shutdown has begun."""
        if self._closed:
            raise CapacityError(SHUTTING_DOWN, RETRY_AFTER_SECONDS)

    def enter(self) -> None:
        """Count one request until `leave`. Raises CapacityError like `check_open`."""
        with self._lock:
            self.check_open()
            self._running += 1

    def leave(self) -> None:
        with self._lock:
            self._running -= 1


class QueueLimit:
    """Bounds the steered requests that wait for bank rows: the engine's number, plus those admitted since.

    ask: returns how many steered requests wait now, over all engines.
    """

    def __init__(
        self, ask: Callable[[], Awaitable[int]], limit: int, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._ask = ask
        self._limit = limit
        self._clock = clock
        self._known = 0
        self._entered = 0
        self._asked_at = float("-inf")
        self._lock = asyncio.Lock()

    async def enter(self) -> None:
        """Count one more request. Raises CapacityError if the queue is full."""
        async with self._lock:
            if self._clock() - self._asked_at >= REFRESH_SECONDS:
                self._known = await self._ask()
                self._entered = 0
                self._asked_at = self._clock()
        if self._known + self._entered >= self._limit:
            raise CapacityError(
                f"The steering queue is full ({self._limit} requests, max_bank_queue); retry later.",
                QUEUE_RETRY_SECONDS,
            )
        self._entered += 1


class BodyBudget:
    """Bounds the bytes of the bodies that are held at once. For use on the event loop."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0


class BodyShare:
    """What one request holds of the budget, from the first bytes of its body until `release`."""

    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self._held = 0

    def add(self, count: int) -> None:
        """Count bytes that were received. Raises CapacityError if they exceed the budget and the body is not small."""
        self._held += count
        self._budget.held += count
        if self._budget.held > self._budget.limit and self._held > SMALL_BODY_BYTES:
            raise CapacityError(
                f"The bodies of running requests fill the budget of {self._budget.limit} bytes (max_bodies_bytes); "
                "retry later.",
                BODY_RETRY_SECONDS,
            )

    def release(self) -> None:
        self._budget.held -= self._held
        self._held = 0
