"""What an answer says about steering, and errors in OpenAI's format.

An error is `{"error": {"message", "type", "param", "code"}}`.
"""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass, field
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
from steer_engine.probe_report import ProbeAnswer
from steer_engine.resolve import ResolvedSpec

MAX_MESSAGE_CHARS = 600

# vLLM's own names, so that clients need one table.
_TYPES = {400: "BadRequestError", 404: "NotFoundError", 503: "ServiceUnavailableError"}


@dataclass
class RequestNote:
    """What the current request's answer must say. One object per HTTP request.

    vLLM runs handlers in child tasks, whose context variables their parent does not see; the object is shared instead.

    searched: the middleware has searched the raw body for misplaced steering.
    resolved: the request's steering; the engine client takes it from here. None for unsteered requests.
    report: the `steering` object of the answer's body; None for unsteered requests.
    model: the model name in the answer, where it differs from vLLM's (`BASE:PRESET`).
    body_model: the model name in the request's body, on a path that loses it before the check (SageMaker).
    retry_after: seconds for a `Retry-After` header.
    refusal: why the request was refused; for `/v1/messages`, whose handler drops `param`.
    captured: rows of this request are being captured; a second prompt is refused.
    num_prompts: prompts that entered the engine. decisions: how their conditions were decided (`applied.Decisions`).
    probe_answers: the numbers of probes, by the choice's number in the answer.
    """

    searched: bool = False
    resolved: ResolvedSpec | None = None
    report: dict[str, Any] | None = None
    model: str | None = None
    body_model: str | None = None
    retry_after: float | None = None
    refusal: SteerError | None = None
    captured: bool = False
    num_prompts: int = 0
    decisions: dict[tuple[int, int], list[Any]] = field(default_factory=dict)
    probe_answers: dict[int, ProbeAnswer] = field(default_factory=dict)


current_note: ContextVar[RequestNote | None] = ContextVar("steer_engine_note", default=None)
"""Set by the middleware, or by the check itself where there is no middleware (batch files)."""


def begin_note() -> RequestNote:
    """The current request's note, reset; a new one where no middleware made one."""
    note = current_note.get()
    if note is None:
        note = RequestNote()
        current_note.set(note)
    # The middleware has set these two before.
    vars(note).update(vars(RequestNote(searched=note.searched, body_model=note.body_model)))
    return note


def status_of(error: SteerError) -> int:
    """The HTTP status of an error that a request can cause."""
    if isinstance(error, SteeringRequestError | CapacityError | RegistryError):
        return error.status
    if isinstance(error, UnusableVectorError | ModelMismatchError):
        return HTTPStatus.UNPROCESSABLE_ENTITY
    assert isinstance(error, VectorFileError), f"{type(error).__name__} is not caused by a request"
    return HTTPStatus.BAD_REQUEST


def envelope(message: str, status: int, param: str | None = None) -> dict[str, Any]:
    """The body of an error answer."""
    kind = _TYPES.get(status) or HTTPStatus(status).phrase.replace(" ", "") + "Error"
    return {"error": {"message": message[:MAX_MESSAGE_CHARS], "type": kind, "param": param, "code": int(status)}}


def envelope_of(error: SteerError) -> dict[str, Any]:
    """The body for an error that a request caused."""
    return envelope(error.message, status_of(error), getattr(error, "param", None))
