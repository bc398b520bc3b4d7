"""What an arm offers."""

from __future__ import annotations

from typing import Any, Protocol

from steer_bench.load import Load
from steer_bench.timing import Timing


class Arm(Protocol):
    """A loaded model."""

    def describe(self) -> dict[str, Any]:
        """Versions, runner, threads and what is armed: recorded, and asserted by the questions."""

    def run(self, load: Load, *, check: bool = False) -> Timing:
        """Answer the load. check: also look up what the engine applies (not to be timed)."""

    def ask(self, what: str, **arguments: Any) -> Any:
        """A question that only some arms know."""
