"""Which vectors an API process believes its engines hold, and since when it has not asked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from steer_engine.runtime.resident import PIN_SECONDS

FRESH_SECONDS = PIN_SECONDS / 2
"""An engine keeps what it was given or asked for PIN_SECONDS; half of it is left for the request to arrive."""


class Held:
    """A hint: the engine core decides. Other API processes of the same engines, and each of several engines, make room
    for their own vectors, and only the one who asked hears of it: so a belief is good for FRESH_SECONDS.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._confirmed: dict[str, float] = {}

    def __contains__(self, digest: str) -> bool:
        """Whether the engines had it when they were last asked."""
        return digest in self._confirmed

    def is_fresh(self, digest: str) -> bool:
        """Whether the engines keep it for a request that is sent now."""
        confirmed = self._confirmed.get(digest)
        return confirmed is not None and self._clock() - confirmed < FRESH_SECONDS

    def confirm(self, digest: str, asked: float) -> None:
        """All engines held it when they were asked at `asked`, and keep it for PIN_SECONDS from then on."""
        self._confirmed[digest] = asked

    def forget(self, digests: Iterable[str]) -> None:
        for digest in digests:
            self._confirmed.pop(digest, None)

    def now(self) -> float:
        return self._clock()
