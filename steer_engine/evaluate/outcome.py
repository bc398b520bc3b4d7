"""The result of an evaluation as plain data. JSON contains everything; CSV and DataFrame have a line per condition."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from dataclasses import asdict, dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.conditions import Condition
from steer_engine.evaluate.statistics import Interval, Paired, bootstrap
from steer_engine.evaluate.sweep import Table
from steer_engine.vectors.control_vector import ControlVector

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from pandas import DataFrame

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
class Sweep:
    """Conditions and their metrics. facts: model, task, sizes, seed, settings."""

    facts: dict[str, Any]
    points: list[Point]

    def to_csv(self) -> str:
        columns = self._columns()
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(columns)
        for row in self._rows():
            cells = (row.get(name, "") for name in columns)
            writer.writerow([cell if isinstance(cell, str) else f"{cell:.6g}" for cell in cells])
        return out.getvalue()

    def to_frame(self) -> DataFrame:
        """A `pandas.DataFrame` with a row per condition: split, vector, blocks, alpha, and of each metric the mean and
        the ends of its 95 % interval (`NAME_low`, `NAME_high`).

        Raises:
            EvaluationError: pandas is not installed.
        """
        return _pandas().DataFrame(self._rows(), columns=self._columns())

    def plot(self, metric: str = "accuracy", *, split: str = "validation") -> Figure:
        """A `matplotlib.figure.Figure`: a metric against strength with its 95 % interval, a line per vector and blocks.

        Raises:
            EvaluationError: matplotlib is not installed, or no condition of the split has the metric.
        """
        try:
            make = import_module("matplotlib.figure").Figure
        except ImportError:
            raise EvaluationError("A picture needs matplotlib: pip install 'steer-engine[report]'.") from None
        measured = [point for point in self.points if point.split == split and metric in point.metrics]
        lines = list(dict.fromkeys((point.vector, point.blocks) for point in measured if point.vector))
        if not lines:
            known = sorted({f"{name} ({point.split})" for point in self.points for name in point.metrics})
            raise EvaluationError(f"No condition of split {split!r} has {metric!r}; there are {', '.join(known)}.")
        figure: Figure = make(figsize=(6.0, 3.6), layout="constrained")
        axis = figure.subplots()
        for vector, blocks in lines:
            # The unsteered point belongs to every line.
            own = [point for point in measured if not point.vector or (point.vector, point.blocks) == (vector, blocks)]
            own.sort(key=lambda point: point.alpha)
            alphas = [point.alpha for point in own]
            values = [point.metrics[metric] for point in own]
            (drawn,) = axis.plot(
                alphas, [value.mean for value in values], marker="o", ms=3, label=f"{vector} @ {blocks}"
            )
            ends = [value.low for value in values], [value.high for value in values]
            axis.fill_between(alphas, *ends, color=drawn.get_color(), alpha=0.15, lw=0)
        axis.set(xlabel=f"strength ({self.facts.get('unit', 'vector')})", ylabel=metric, title=f"{metric}, {split}")
        axis.legend(fontsize=8)
        axis.spines[["top", "right"]].set_visible(False)
        return figure

    def _columns(self) -> list[str]:
        names = dict.fromkeys(name for point in self.points for name in point.metrics)
        ends = [f"{name}{end}" for name in names for end in ("", "_low", "_high")]
        return ["split", "vector", "blocks", "alpha", *ends]

    def _rows(self) -> list[dict[str, str | float]]:
        rows = []
        for point in self.points:
            row: dict[str, str | float] = {
                "split": point.split, "vector": point.vector, "blocks": point.blocks, "alpha": point.alpha
            }  # fmt: skip
            for name, found in point.metrics.items():
                row |= {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
            rows.append(row)
        return rows


@dataclass(frozen=True, kw_only=True)
class Outcome(Sweep):
    """A complete evaluation. facts: model, task, sizes, seed, settings, versions, machine, command."""

    verdicts: list[Verdict]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n"

    def trials_frame(self) -> DataFrame:
        """A `pandas.DataFrame` with a row per trial on the test split: the chosen condition and its controls.

        Raises:
            EvaluationError: pandas is not installed.
        """
        rows = [
            {
                "vector": verdict.vector, "trial": trial.name, "blocks": trial.blocks, "alpha": trial.alpha,
                "before": trial.paired.before, "after": trial.paired.after, "gained": trial.paired.gained,
                "lost": trial.paired.lost, "p_holm": trial.p_holm, "neutral_kl": trial.neutral_kl,
            }
            for verdict in self.verdicts
            for trial in verdict.trials
        ]  # fmt: skip
        return _pandas().DataFrame(rows)


def _pandas() -> Any:
    try:
        return import_module("pandas")
    except ImportError:
        raise EvaluationError("A DataFrame needs pandas: pip install pandas.") from None


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
