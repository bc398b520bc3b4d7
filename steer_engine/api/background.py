"""What an API process does beside requests: readiness checks, gauges, and keeping the mirror in sync."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from steer_engine.errors import CapacityError, SteerError
from steer_engine.settings import MIRROR_URL_ENV, mirror_seconds
from steer_engine.vectors.mirror import Mirror
from steer_engine.vectors.registry import Registry

PROBE_TIMEOUT_SECONDS = 5.0
GAUGE_SECONDS = 10.0

MAX_REASON_CHARS = 200
"""Of an error that is not ours, in the log."""

Handshake = Callable[[], Awaitable[dict[str, Any]]]

logger = logging.getLogger(__name__)


class Readiness:
    """Whether every engine and worker behind this server is armed like it. Concurrent probes share one handshake.

    A handshake is never cancelled: the workers' reply would stay unread, and the next caller would read it. So the
    timeout is around a shielded task.
    """

    def __init__(self, handshake: Handshake, timeout: float = PROBE_TIMEOUT_SECONDS) -> None:
        self._handshake = handshake
        self._timeout = timeout
        self._running: asyncio.Task[dict[str, Any]] | None = None

    async def check(self) -> dict[str, Any]:
        """The status of the engines.

        Raises:
            SteerError: an engine is not armed like this server, or it does not answer; the message gives the reason.
        """
        if self._running is None or self._running.done():
            self._running = asyncio.create_task(self._ask())
            # It may fail after the timeout, when nobody waits for it any more: the next check asks again.
            self._running.add_done_callback(lambda task: task.cancelled() or task.exception())
        try:
            return await asyncio.wait_for(asyncio.shield(self._running), self._timeout)
        except TimeoutError:
            raise CapacityError(f"The engine has not answered for {self._timeout:g} s.") from None

    async def _ask(self) -> dict[str, Any]:
        try:
            return await self._handshake()
        except SteerError:
            raise
        except Exception as error:
            # A dead engine raises vLLM's own errors here.
            raise CapacityError(f"The engine does not answer: {type(error).__name__}.") from error


async def refresh_gauges(readiness: Readiness, registry: Registry, period: float = GAUGE_SECONDS) -> None:
    """Update the gauges of engine and registry every `period` seconds, until cancelled."""
    from steer_engine.api import metrics  # in API processes only: vLLM chooses the metrics mode before this import

    while True:
        try:
            status = await readiness.check()
            metrics.engine_refreshed(status["workers"], status["waiting"], status["ended_non_finite"])
        except Exception as error:  # the next round tries again, whatever it is
            metrics.engine_refreshed([])
            logger.warning("Not ready: %s", _reason(error))
        try:
            names, generation, fault = await asyncio.to_thread(
                lambda: (registry.names(), registry.generation, registry.fault)
            )
            metrics.registry_refreshed(len(names), generation, readable=fault is None)
        except Exception as error:
            metrics.registry_readable.set(0)
            logger.error("The registry cannot be read: %s", _reason(error))
        await asyncio.sleep(period)


async def sync_mirror(url: str, folder: Path, seconds: float) -> None:
    """Keep `folder` in sync with `url` until cancelled. API processes that share the folder take turns.

    A round that fails for any reason is counted and logged, and the next one tries again.
    """
    from steer_engine.api import metrics

    mirror: Mirror | None = None
    reported: str | None = None
    while True:
        fault = None
        try:
            if mirror is None:
                mirror = await asyncio.to_thread(Mirror, url, folder)
            await asyncio.to_thread(mirror.sync)
            metrics.mirror_left_out.set(len(mirror.faults))
        except Exception as error:
            fault = f"The mirror of {url} is not in sync: {_reason(error)}"
            metrics.mirror_failures.inc()
            if fault != reported:
                logger.error("%s", fault, exc_info=None if isinstance(error, SteerError) else error)
        metrics.mirror_failing.set(fault is not None)
        if fault is None and reported is not None:
            logger.info("%s can be read again.", url)
        reported = fault
        await asyncio.sleep(seconds)


def _reason(error: Exception) -> str:
    return (
        error.message if isinstance(error, SteerError) else f"{type(error).__name__}: {str(error)[:MAX_REASON_CHARS]}"
    )


def start_mirror(folder: Path | None) -> asyncio.Task[None] | None:
    """The task that keeps this process's folder in sync, if the operator configured a mirror."""
    url = os.environ.get(MIRROR_URL_ENV)
    if not url or folder is None:
        return None
    return asyncio.create_task(sync_mirror(url, folder, mirror_seconds()))
