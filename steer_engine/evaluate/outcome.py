"""What an evaluation found, as plain data: JSON with everything, CSV with one line per condition."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from steer_engine.evaluate.conditions import Condition
from steer_engine.evaluate.statistics import Interval, Paired, bootstrap
from steer_engine.evaluate.sweep import Table
from steer_engine.vectors.control_vector import ControlVector

CURVE_RESAMPLES = 2000
"""For the band of one point of a plot."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One condition on one split: mean and interval of every metric."""

    split: str
    vector: str
    blocks: str
    alpha: float
    metrics: dict[str, Interval]

    @classmethod
    def of(cls, split: str, condition: Condition, numbers: Table) -> Point:
        metrics = {name: bootstrap(values, resamples=CURVE_RESAMPLES) for name, values in numbers.items()}
        baseline = condition.is_baseline
        return cls(
            split=split,
            vector="" if baseline else condition.vector,
            blocks="" if baseline else condition.blocks,
            alpha=0.0 if baseline else condition.alpha,
            metrics=metrics,
        )


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A condition against no steering on the test split. p_holm: corrected for all trials of the run.

    neutral_kl: mean KL on neutral texts, nats.
    """

    name: str
    is_control: bool
    blocks: str
    alpha: float
    paired: Paired
    p_holm: float
    neutral_kl: float
    about: str = ""


@dataclass(frozen=True, kw_only=True)
class Flip:
    """A test item whose answer changed."""

    prompt: str
    answer: str
    gained: bool
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Example:
    """What the model writes after a prompt, unsteered and steered."""

    prompt: str
    plain: str
    steered: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """One vector: what validation chose, and what the test split says of it.

    steerability: slope of the mean margin of the right answer against strength, at the chosen blocks (validation).
    validation: score of the chosen condition, and of no steering, there.
    """

    vector: str
    digest: str
    blocks: str
    alpha: float
    validation: float
    validation_baseline: float
    steerability: float | None
    trials: list[Trial]
    flips: list[Flip] = field(default_factory=list)
    margins: list[tuple[float, float]] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)

    @property
    def main(self) -> Trial:
        return next(trial for trial in self.trials if not trial.is_control)

    @property
    def controls(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.is_control]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A whole evaluation. facts: model, task, sizes, seeds, versions, machine, command."""

    facts: dict[str, Any]
    points: list[Point]
    verdicts: list[Verdict]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        names = list(dict.fromkeys(name for point in self.points for name in point.metrics))
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        heads = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
        writer.writerow(["split", "vector", "blocks", "alpha", *heads])
        for point in self.points:
            cells: list[str] = []
            for name in names:
                found = point.metrics.get(name)
                cells += ["", "", ""] if found is None else [f"{x:.6g}" for x in (found.mean, found.low, found.high)]
            writer.writerow([point.split, point.vector, point.blocks, f"{point.alpha:g}", *cells])
        return out.getvalue()


def machine() -> dict[str, Any]:
    """Where numbers were measured, without its name."""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.machine()
    return {"device": device, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}


def means(numbers: Mapping[str, np.ndarray]) -> dict[str, float]:
    return {name: float(values.mean()) for name, values in numbers.items()}


def calibrated(vector: ControlVector, outcome: Outcome) -> ControlVector:
    """The vector with what was found in its metadata: `suggested_blocks`, `suggested_scale`, `suggested_unit`,
    `suggested_scope`, and `suggested_because` with the test split's numbers, significant or not.
    """
    (verdict,) = (each for each in outcome.verdicts if each.digest == vector.digest)
    trial, facts = verdict.main, outcome.facts
    because = (
        f"{facts['task']}: {100 * trial.paired.before:.1f} % to {100 * trial.paired.after:.1f} % of "
        f"{facts['sizes']['test']} test items (p = {trial.p_holm:.2g} after Holm), KL {trial.neutral_kl:.3g} nats on "
        f"neutral texts"
    )
    found = {
        "suggested_blocks": verdict.blocks,
        "suggested_scale": f"{verdict.alpha:g}",
        "suggested_unit": str(facts["unit"]),
        "suggested_scope": str(facts["scope"]),
        "suggested_because": because,
    }
    return vector.with_metadata(extra={**vector.metadata.extra, **found})
