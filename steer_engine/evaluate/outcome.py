"""The result of an evaluation as plain data. JSON contains everything; CSV has one line per condition."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from typing import Any

from steer_engine.evaluate.conditions import Condition
from steer_engine.evaluate.statistics import Interval, Paired, bootstrap
from steer_engine.evaluate.sweep import Table
from steer_engine.vectors.control_vector import ControlVector

CURVE_RESAMPLES = 2000
"""Bootstrap resamples for the confidence band of one point in a plot."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One condition on one split: mean and 95 % interval of every metric."""

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
    """One condition compared with no steering on the test split.

    p_holm: p-value corrected for all trials of the run. neutral_kl: mean KL on neutral texts, in nats.
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
    """A test item whose correctness changed. before, after: its margin, or its accuracy for an exact match."""

    prompt: str
    answer: str
    gained: bool
    before: float
    after: float


@dataclass(frozen=True, kw_only=True)
class Example:
    """A prompt with the model's continuation, unsteered and steered."""

    prompt: str
    plain: str
    steered: str


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """The result of one vector: the condition that validation chose, and its trials on the test split.

    validation, validation_baseline: mean validation score of the chosen condition, and of no steering.
    steerability: slope of the mean margin against strength at the chosen blocks, on validation. None for exact
        matches.
    margins: margin of each test item, unsteered and steered.
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
    """A complete evaluation. facts: model, task, sizes, seed, settings, versions, machine, command."""

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


@dataclass(frozen=True, kw_only=True)
class PaperRun:
    """The paper's protocol and ours on one task."""

    task: str
    paper: Outcome
    ours: Outcome


def machine() -> dict[str, Any]:
    """The hardware and system that the numbers were measured on, without the host name."""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else platform.machine()
    return {"device": device, "cores": os.cpu_count(), "system": platform.system(), "python": platform.python_version()}


def calibrated(vector: ControlVector, outcome: Outcome) -> ControlVector:
    """The vector with the result in its metadata.

    Sets `suggested_blocks`, `suggested_scale`, `suggested_unit`, `suggested_scope`, and `suggested_because` with the
    numbers of the test split, whether they are significant or not.
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
