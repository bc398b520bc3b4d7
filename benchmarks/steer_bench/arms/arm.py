"""The interface of an arm."""

from __future__ import annotations

from typing import Any, Protocol

from steer_bench.load import Load
from steer_bench.timing import Timing


class Arm(Protocol):
    """A loaded model."""

    def describe(self) -> dict[str, Any]:
        """Versions, runner, threads, armed blocks and operations. Questions record and check them."""

    def run(self, load: Load, *, check: bool = False) -> Timing:
        """Run the load. check: also collect log-probabilities and the applied steering (too slow for timing)."""

    def command(self, what: str, **arguments: Any) -> Any:
        """Run a command that only some arms have. Raises ValueError for an unknown one."""
