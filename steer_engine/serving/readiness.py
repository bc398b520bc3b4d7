"""Is every engine and worker behind this server armed alike? Asked anew for each probe, one question at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

from steer_engine.errors import CapacityError, SteerError

PROBE_TIMEOUT_S = 5.0

Handshake = Callable[[], Awaitable[dict[str, Any]]]


class Readiness:
    """Runs the handshake for however many probes arrive together, and never gives it up half way.

    A call to the workers that is abandoned leaves its reply unread for the next caller: the timeout is around a
    shielded task that goes on.
    """

    def __init__(self, handshake: Handshake, timeout_s: float = PROBE_TIMEOUT_S) -> None:
        self._handshake = handshake
        self._timeout_s = timeout_s
        self._running: asyncio.Task[dict[str, Any]] | None = None

    async def check(self) -> dict[str, Any]:
        """What the engine says of itself.

        Raises:
            SteerError: it is not armed as this server is, or it does not answer; the message says why.
        """
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._ask())
        try:
            return await asyncio.wait_for(asyncio.shield(self._running), self._timeout_s)
        except TimeoutError:
            raise CapacityError(f"The engine has not answered for {self._timeout_s:g} s.") from None

    async def _ask(self) -> dict[str, Any]:
        try:
            return await self._handshake()
        except SteerError:
            raise
        except Exception as error:
            # A dead engine raises vLLM's own errors here: not ready, and the reason is theirs.
            raise CapacityError(f"The engine does not answer: {type(error).__name__}.") from error
