"""How many steered requests wait for room in the bank, and when there are too many."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from steer_engine.errors import CapacityError

REFRESH_SECONDS = 0.25
"""How old the engine's own number may be. It answers between two steps, so it is not asked for each request."""

RETRY_AFTER_SECONDS = 2.0


class QueueLength:
    """The engine's number, and those that have come in since it was asked, against a limit.

    ask: how many steered requests of all engines wait now.
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
        """One request more. Raises CapacityError where as many wait as may."""
        async with self._lock:
            if self._clock() - self._asked_at >= REFRESH_SECONDS:
                self._known = await self._ask()
                self._entered = 0
                self._asked_at = self._clock()
        if self._known + self._entered >= self._limit:
            raise CapacityError(
                f"{self._limit} steered requests wait for room already (max_bank_queue); try again.",
                RETRY_AFTER_SECONDS,
            )
        self._entered += 1
