"""Is every engine and worker behind this server armed alike? Asked anew for each probe, one question at a time."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from steer_engine.api import metrics
from steer_engine.errors import CapacityError, RegistryError, SteerError
from steer_engine.vectors.mirror import Mirror

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


logger = logging.getLogger(__name__)

PERIOD_S = 10.0


async def poll(readiness: Readiness, registry: Any, period_s: float = PERIOD_S) -> None:
    """For ever, until cancelled."""
    while True:
        try:
            status = await readiness.check()
            metrics.engine_polled(status["workers"], status["waiting"])
        except SteerError as error:
            metrics.engine_polled([])
            logger.warning("Not ready: %s", error.message)
        try:
            names, generation, fault = await asyncio.to_thread(
                lambda: (registry.names(), registry.generation, registry.fault)
            )
            metrics.registry_polled(len(names), generation, readable=fault is None)
        except SteerError as error:
            logger.error("The registry cannot be read: %s", error.message)
        await asyncio.sleep(period_s)


URL_ENV = "STEER_ENGINE_MIRROR"
SECONDS_ENV = "STEER_ENGINE_MIRROR_SECONDS"
DEFAULT_SECONDS = 60.0


def copy_first(url: str, folder: Path) -> None:
    """Copy `url` into `folder`. An URL that is away is no fault where there are copies of before.

    Raises:
        SteerError: it can't be read and never was.
    """
    mirror = Mirror(url, folder)
    try:
        mirror.sync()
    except RegistryError as error:
        if not mirror.has_copies:
            raise
        logger.error("%s The copies of before are served.", error.message)


async def keep_alike(url: str, folder: Path, seconds: float) -> None:
    """For ever, until cancelled; API processes that share the folder take turns."""
    from steer_engine.api import metrics  # in API processes only: vLLM chooses its mode before it is imported

    mirror = Mirror(url, folder)
    said: str | None = None
    while True:
        fault = None
        try:
            await asyncio.to_thread(mirror.sync)
        except RegistryError as error:
            fault = error.message
        metrics.mirror_failing.set(fault is not None)
        if fault != said:
            logger.error("%s", fault) if fault else logger.info("%s can be read again.", url)
        said = fault
        await asyncio.sleep(seconds)


def from_environment(folder: Path | None) -> asyncio.Task[None] | None:
    """The task that keeps this process's folder alike, where the operator gave a URL."""
    url = os.environ.get(URL_ENV)
    if not url or folder is None:
        return None
    return asyncio.create_task(keep_alike(url, folder, float(os.environ.get(SECONDS_ENV) or DEFAULT_SECONDS)))
