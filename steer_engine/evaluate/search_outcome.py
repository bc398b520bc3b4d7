"""The result of a search as plain data, its verdict in words, and its page in Markdown."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from steer_engine.evaluate.quality import Quality
from steer_engine.evaluate.statistics import Interval, Paired

MIN_GAIN = 0.05
"""Smallest gain of accuracy that counts as one."""

MAX_P = 0.01
"""Largest p-value after Holm of a gain that counts as one."""

MAX_EXPLAINED = 0.5
"""A gain of which a fixed preference explains this share is not called a better choice."""

_POWER_Z = 2.576 + 0.842
"""Standard errors between 0 and a gain that is found with power 0.8 at p < 0.01, two-sided."""

_SHOWN_TRIES = 15


@dataclass(frozen=True, kw_only=True)
class Try:
    """One point of the grid on the validation items. gained, lost: items that became right, and wrong."""

    task: str
    recipe: str
    blocks: str
    alpha: float
    quality: Quality
    gained: int
    lost: int


@dataclass(frozen=True, kw_only=True)
class SearchTrial:
    """One condition or prompt on the test items, compared with the plain model.

    p_holm: corrected for all trials of all tasks. auroc_change: AUROC minus the plain one, with its 95 % interval.
    neutral_kl: mean KL on neutral texts, nats; None for a prompt. extra_tokens: tokens that a prompt adds.
    """

    name: str
    blocks: str
    alpha: float
    paired: Paired
    p_holm: float
    quality: Quality
    auroc_change: Interval
    neutral_kl: float | None
    extra_tokens: float

    @property
    def is_prompt(self) -> bool:
        return self.neutral_kl is None


@dataclass(frozen=True, kw_only=True)
class TaskResult:
    """The point of a task, and its trials on the test items.

    headroom: reasons why the task cannot show a gain. preference: accuracy of the plain model with a fixed preference
    for answers and places that imitates the chosen point (see `quality.fixed_preference`).
    """

    task: str
    about: str
    recipe: str
    digest: str
    blocks: str
    alpha: float
    num_test: int
    plain_validation: Quality
    plain: Quality
    headroom: list[str]
    preference: float
    prompt_tokens: float
    trials: list[SearchTrial]

    @property
    def file_name(self) -> str:
        return "".join(letter if letter.isalnum() or letter == "-" else "-" for letter in self.task)

    @property
    def main(self) -> SearchTrial:
        return next(trial for trial in self.trials if trial.name == "chosen")

    @property
    def controls(self) -> list[SearchTrial]:
        return [trial for trial in self.trials if trial.name != "chosen" and not trial.is_prompt]

    @property
    def close_controls(self) -> list[SearchTrial]:
        """Controls whose interval of the gain reaches that of the chosen point."""
        floor = self.main.paired.difference.low
        return [trial for trial in self.controls if trial.paired.difference.high >= floor]

    @property
    def holds(self) -> bool:
        """Whether this is a gain: at least 5 points, p < 0.01 after Holm, and all controls clearly below it."""
        main = self.main
        return main.paired.difference.mean >= MIN_GAIN and main.p_holm < MAX_P and not self.close_controls

    @property
    def explained(self) -> float:
        """Share of the gain that a fixed preference explains; NaN without a gain."""
        gain = self.main.paired.difference.mean
        return (self.preference - self.plain.accuracy) / gain if gain > 0 else float("nan")

    @property
    def nature(self) -> str:
        """What kind of change this is, in a few words."""
        main = self.main
        if main.paired.difference.mean <= 0 or main.p_holm >= MAX_P:
            return "no gain"
        if math.isnan(main.auroc_change.mean):
            return "task induction: a preference for one place (AUROC is undefined)"
        if main.auroc_change.low <= 0:
            return "correction of a bias (AUROC does not rise)"
        if self.explained >= MAX_EXPLAINED:
            return "mostly a fixed preference for some answers, although AUROC rises"
        return "better choices: AUROC rises, and a fixed preference for answers does not explain it"

    @property
    def detectable(self) -> float:
        """Gain of accuracy that this test finds with power 0.8 at p < 0.01, at the share of items that changed."""
        changed = (self.main.paired.gained + self.main.paired.lost) / self.num_test
        return _POWER_Z * math.sqrt(max(changed, 1 / self.num_test) / self.num_test)


@dataclass(frozen=True, kw_only=True)
class SearchOutcome:
    """A complete search. facts: model, tasks, sizes, seed, grid, versions, machine, command."""

    facts: dict[str, Any]
    tries: list[Try]
    results: list[TaskResult]

    def to_json(self) -> str:
        """Facts and test results. The tries are in the CSV."""
        results = [
            {
                **asdict(each), "holds": each.holds, "nature": each.nature, "detectable": each.detectable,
                "explained": each.explained,
            }
            for each in self.results
        ]  # fmt: skip
        data = {"facts": self.facts, "results": results}
        return json.dumps(_without_nan(data), indent=1, ensure_ascii=False) + "\n"

    def to_csv(self) -> str:
        """One line per try: everything that was tried."""
        out = io.StringIO()
        writer = csv.writer(out, lineterminator="\n")
        names = ("accuracy", "balanced", "auroc", "d_prime", "mass", "kl", "entropy")
        writer.writerow(["task", "recipe", "blocks", "alpha", *names, "gained", "lost"])
        for each in self.tries:
            numbers = [f"{getattr(each.quality, name):.4f}" for name in names]
            writer.writerow([each.task, each.recipe, each.blocks, f"{each.alpha:g}", *numbers, each.gained, each.lost])
        return out.getvalue()

    def to_markdown(self) -> str:
        facts = self.facts
        tasks = "".join(_section(result, self.tries) for result in self.results)
        machine = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
        versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
        return (
            f"# Search on {facts['model']}\n\n{facts['dtype']}, seed {facts['seed']}; {machine}; {versions}.\n\n"
            f"`{facts['command']}`\n\n{len(self.tries)} tries on validation items; one point per task on test items.\n"
            f"{tasks}"
        )


def sentence(result: TaskResult) -> str:
    """The result of a task in one sentence."""
    paired = result.main.paired
    interval = f"95 % interval {100 * paired.difference.low:+.1f} to {100 * paired.difference.high:+.1f}"
    word = "A gain that holds" if result.holds else "No gain that holds"
    return (
        f"{word}: {100 * paired.before:.1f} % to {100 * paired.after:.1f} % of {result.num_test} test items "
        f"({interval}; p = {result.main.p_holm:.2g} after Holm) with {result.recipe}, block {result.blocks}, "
        f"strength {result.alpha:g}; {result.nature}."
    )


def _section(result: TaskResult, tries: Sequence[Try]) -> str:
    own = sorted((each for each in tries if each.task == result.task), key=lambda each: -each.quality.accuracy)
    plain = result.plain_validation
    best = _table(
        ("recipe", "blocks", "strength", "accuracy", "balanced", "AUROC", "mass", "KL", "gained / lost"),
        [
            (
                each.recipe, each.blocks, f"{each.alpha:g}", _percent(each.quality.accuracy),
                _percent(each.quality.balanced), f"{each.quality.auroc:.3f}", f"{each.quality.mass:.3f}",
                f"{each.quality.kl:.2f}", f"{each.gained} / {each.lost}",
            )
            for each in own[:_SHOWN_TRIES]
        ],
    )  # fmt: skip
    reasons = f"Headroom: {'; '.join(result.headroom)}.\n\n" if result.headroom else ""
    close = ", ".join(trial.name for trial in result.close_controls)
    warning = f"Not clearly below the chosen point: {close}.\n\n" if close else ""
    picture = f"![{result.task}: accuracy and AUROC]({result.file_name}.svg)\n\n"
    return (
        f"\n## {result.task}\n\n{result.about}\n\n**{sentence(result)}**\n\n{reasons}{warning}"
        f"{_trials(result)}\n{picture}"
        f"The plain model with a fixed preference for words and places, fitted to imitate the chosen point, is right "
        f"in {_percent(result.preference)}: this explains {100 * result.explained:.0f} % of the change. "
        f"This test finds a gain of {100 * result.detectable:.1f} points with power 0.8 at p < 0.01. Plain accuracy on "
        f"validation: {_percent(plain.accuracy)} (balanced {_percent(plain.balanced)}, AUROC {plain.auroc:.3f}). "
        f"The best of {len(own)} tries there:\n\n{best}"
    )


def _trials(result: TaskResult) -> str:
    plain = result.plain
    names = list(plain.by_class)
    rows = [
        (
            "plain", _percent(plain.accuracy), "", "", "", _percent(plain.balanced), f"{plain.auroc:.3f}", "",
            f"{plain.d_prime:.2f}", f"{plain.mass:.3f}", "", f"{plain.entropy:.2f}", _classes(plain, names), "",
        )
    ]  # fmt: skip
    for trial in result.trials:
        paired, change, found = trial.paired, trial.auroc_change, trial.quality
        cost = f"{trial.extra_tokens:+.0f} tokens" if trial.is_prompt else f"{trial.neutral_kl:.3f}"
        rows.append(
            (
                trial.name, _percent(found.accuracy),
                f"{100 * paired.difference.mean:+.1f} ({100 * paired.difference.low:+.1f} to "
                f"{100 * paired.difference.high:+.1f})",
                f"{paired.gained} / {paired.lost}", f"{trial.p_holm:.2g}", _percent(found.balanced),
                f"{found.auroc:.3f}", f"{change.mean:+.3f} ({change.low:+.3f} to {change.high:+.3f})",
                f"{found.d_prime:.2f}", f"{found.mass:.3f}", "" if trial.is_prompt else f"{found.kl:.2f}",
                f"{found.entropy:.2f}", _classes(found, names), cost,
            )
        )  # fmt: skip
    heads = (
        f"{result.num_test} test items", "accuracy", "change, 95 % interval", "gained / lost", "p, Holm", "balanced",
        "AUROC", "change of AUROC", "d'", "mass", "KL", "entropy", f"accuracy by right answer: {', '.join(names)}",
        "neutral KL, or cost",
    )  # fmt: skip
    return _table(heads, rows)


def _classes(found: Quality, names: Sequence[str]) -> str:
    return ", ".join(_percent(found.by_class[name]) for name in names)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heads, ["---"] * len(heads), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _without_nan(value: Any) -> Any:
    """The same data with NaN as null, which JSON has."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and math.isnan(value) else value
