"""Errors as OpenAI clients expect them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from steer_engine.errors import (
    CapacityError,
    ModelMismatchError,
    RegistryError,
    SteerError,
    SteeringRequestError,
    UnusableVectorError,
    VectorFileError,
)

MAX_MESSAGE_CHARS = 600

# The names that vLLM itself uses, so that a client needs one table.
_TYPES = {400: "BadRequestError", 404: "NotFoundError", 503: "ServiceUnavailableError"}


def status_of(error: SteerError) -> int:
    """The HTTP status of an error that a request can cause."""
    if isinstance(error, SteeringRequestError | CapacityError | RegistryError):
        return error.status
    if isinstance(error, UnusableVectorError | ModelMismatchError):
        return HTTPStatus.UNPROCESSABLE_ENTITY
    assert isinstance(error, VectorFileError), f"{type(error).__name__} is no request's fault"
    return HTTPStatus.BAD_REQUEST


def envelope(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """The body of an error answer."""
    kind = _TYPES.get(status) or HTTPStatus(status).phrase.replace(" ", "") + "Error"
    return {"error": {"message": message[:MAX_MESSAGE_CHARS], "type": kind, "param": param, "code": int(status)}}


def envelope_of(error: SteerError) -> dict[str, Any]:
    """The body for an error that a request caused."""
    return envelope(error.message, status_of(error), getattr(error, "param", None))


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
