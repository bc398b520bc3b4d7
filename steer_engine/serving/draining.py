"""A server that shuts down: what is under way may finish, nothing new is taken."""

from __future__ import annotations

from typing import Any

from steer_engine.errors import CapacityError

RETRY_AFTER_S = 5.0


def refuse_if_draining(frontend: Any) -> None:
    """Raise CapacityError once the engine client of this `Frontend` has begun to shut down."""
    if getattr(frontend, "draining", False):
        raise CapacityError("This server is shutting down; send the request to another one.", RETRY_AFTER_S)
