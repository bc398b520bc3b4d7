"""The operator's read-only mirror: copied before the server starts, and kept alike while it serves."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from steer_engine.errors import RegistryError
from steer_engine.vectors.mirror import Mirror

URL_ENV = "STEER_ENGINE_MIRROR"
SECONDS_ENV = "STEER_ENGINE_MIRROR_SECONDS"
DEFAULT_SECONDS = 60.0

logger = logging.getLogger(__name__)


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
    from steer_engine.serving import metrics  # in API processes only: vLLM chooses its mode before it is imported

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
