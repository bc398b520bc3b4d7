"""The error tree: its classes, their statuses, and that errors survive a process boundary."""

from __future__ import annotations

import copy
import pickle

import pytest

from steer_engine import errors
from steer_engine.errors import (
    CapacityError,
    DerivationError,
    ModelError,
    PayloadTooLargeError,
    SteerError,
    SteeringRequestError,
    UnknownVectorError,
    UnsupportedEngineError,
    VectorFileError,
)

KINDS = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, SteerError)]


def documented_tree() -> dict[str, str | None]:
    """Class -> its parent, from the tree in the module's docstring."""
    parents: dict[str, str | None] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        words = line.replace("├──", "   ").replace("└──", "   ").replace("│", " ")
        name = words.split()[0] if words.split() else ""
        if not name.endswith("Error"):
            continue
        depth = (len(words) - len(words.lstrip())) // 4 - 1
        above[depth:] = [name]
        parents[name] = above[depth - 1] if depth else None
    return parents


def test_the_docstring_shows_the_tree() -> None:
    parents = {kind: [base.__name__ for base in kind.__bases__ if issubclass(base, SteerError)] for kind in KINDS}
    assert documented_tree() == {kind.__name__: above[0] if above else None for kind, above in parents.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_is_enough_to_make_an_error(kind: type[SteerError]) -> None:
    error = kind("What is wrong.")
    assert error.message == str(error) == "What is wrong."


@pytest.mark.parametrize(
    ("kind", "status"),
    [(SteeringRequestError, 400), (UnknownVectorError, 404), (PayloadTooLargeError, 413), (CapacityError, 503)],
)
def test_statuses(kind: type[SteerError], status: int) -> None:
    assert kind("x").status == status  # type: ignore[attr-defined]


def test_invalid_input_is_a_value_error_and_a_refused_engine_a_runtime_error() -> None:
    for kind in (SteeringRequestError, VectorFileError, DerivationError):
        assert issubclass(kind, ValueError)
    for kind in (UnsupportedEngineError, ModelError):
        assert issubclass(kind, RuntimeError)
    assert not issubclass(CapacityError, ValueError)


@pytest.mark.parametrize(
    "error",
    [
        SteeringRequestError("m", "steering.edits[0].scale"),
        UnknownVectorError("m", "steering.edits[0].vector"),
        PayloadTooLargeError("m", None),
        CapacityError("m", 2.5),
        UnsupportedEngineError("m"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_cross_processes_unchanged(error: SteerError) -> None:
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is type(error)
        assert vars(again) == vars(error)
        assert str(again) == str(error)
