"""What the answer to the request in hand must say about steering."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any


@dataclass
class Told:
    """Filled by the hook that resolves a request, read by the middleware that sends the answer's headers.

    One object per HTTP request. It is shared by reference, since vLLM runs the handler in a child task whose own
    context variables the middleware would not see.

    seen: some hook took account of the request's steering (even if there was none).
    report: the `steering` object of the answer's body, or None where no steering was asked.
    retry_after: seconds for a `Retry-After` header.
    model: what the body names, on a path where that is lost before the hook (SageMaker's `/invocations`).
    """

    seen: bool = False
    report: dict[str, Any] | None = None
    retry_after: float | None = None
    model: str | None = None


current: ContextVar[Told | None] = ContextVar("steer_engine_told", default=None)
"""Set by the middleware; None outside of HTTP (batch files)."""


def begin() -> Told:
    """The note of the request in hand, emptied: a fresh one where no middleware made one."""
    told = current.get() or Told()
    told.seen, told.report, told.retry_after = True, None, None
    return told
