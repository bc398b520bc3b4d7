"""Errors as OpenAI clients expect them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

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
