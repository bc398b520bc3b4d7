"""The door of a server that shuts down: who is inside may finish, nobody new comes in."""

from __future__ import annotations

import threading

from steer_engine.errors import CapacityError

RETRY_AFTER_S = 5.0
SHUTTING_DOWN = "This server is shutting down; send the request to another one."


class Door:
    """Counts the requests inside, and lets none in once it is closed.

    Requests come and go on the event loop; whoever shuts down closes it and looks inside from another thread. A request
    is inside, or was sent away: none slips in between.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    @property
    def inside(self) -> int:
        return self._inside

    def close(self) -> None:
        with self._lock:
            self._closed = True

    def refuse_if_closed(self) -> None:
        """Raise CapacityError once the server has begun to shut down."""
        if self._closed:
            raise CapacityError(SHUTTING_DOWN, RETRY_AFTER_S)

    def enter(self) -> None:
        """One more inside, until `leave`. Raises CapacityError as `refuse_if_closed`."""
        with self._lock:
            self.refuse_if_closed()
            self._inside += 1

    def leave(self) -> None:
        with self._lock:
            self._inside -= 1
