"""Keeps the gauges true: asks the engine and looks at the registry every few seconds."""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from steer_engine.errors import SteerError
from steer_engine.serving import metrics
from steer_engine.serving.readiness import Readiness

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
