"""What the commands of this package share: reading options, and saying what came out."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from steer_engine.derive.methods import require_method
from steer_engine.errors import EvaluationError
from steer_engine.evaluate.contrasts import Against
from steer_engine.evaluate.outcome import Outcome
from steer_engine.evaluate.plan import Plan, Recipe, parse_alphas
from steer_engine.evaluate.report import sentence, warnings
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.files import load


def checked(option: str, value: str, valid: Sequence[str]) -> Any:
    """The value, or EvaluationError with the valid ones."""
    if value not in valid:
        raise EvaluationError(f"{option} {value[:64]!r} is none of {', '.join(valid)}.")
    return value


def recipes_of(methods: Sequence[str], against: str) -> tuple[Recipe, ...]:
    """Vectors to derive from the task. Raises DerivationError, EvaluationError for names that there are not."""
    contrast = cast(Against, checked("--against", against, ("wrong", "random")))
    return tuple(Recipe(method=require_method(method), against=contrast) for method in methods)


def vectors_of(files: Sequence[Path]) -> dict[str, ControlVector]:
    """Vectors by the stem of their file."""
    vectors = {file.stem: load(file) for file in files}
    if len(vectors) < len(files):
        raise EvaluationError("Two of the vector files have the same name; results tell vectors apart by it.")
    return vectors


def plan_of(*, alphas: str, unit: str, scope: str, score: str, **settings: Any) -> Plan:
    """A plan from options as they were typed."""
    return Plan(
        alphas=parse_alphas(alphas),
        unit=checked("--unit", unit, ("vector", "residual")),
        scope=checked("--scope", scope, ("all", "prompt", "generation")),
        score=checked("--score", score, ("accuracy", "share_correct")),
        **settings,
    )


def command_line() -> str:
    """How this process was called, for a report."""
    return shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])


def say(outcome: Outcome, page: Path) -> None:
    """The verdicts and where the page is, on standard output."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for verdict in outcome.verdicts:
        console.print(f"{verdict.vector}: {sentence(verdict)}")
        for warning in warnings(verdict):
            console.print(f"  {warning}")
    console.print(f"report: {page}")
