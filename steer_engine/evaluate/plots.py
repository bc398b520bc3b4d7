"""Draws the figures of a report as SVG text, and those of a condition and a probe, with matplotlib (extra `report`)."""

from __future__ import annotations

import io
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from steer_engine.derive.condition import ConditionFit
from steer_engine.derive.probe_quality import ProbeReport, Scores, binned, probabilities
from steer_engine.errors import EvaluationError
from steer_engine.evaluate.outcome import Outcome, Point, Verdict

if TYPE_CHECKING:
    from steer_engine.evaluate.search_outcome import TaskResult, Try

COLOURS = ("#2166ac", "#b2182b", "#1b7837", "#762a83", "#e08214", "#4d4d4d")
GREY = "#777777"


def require_matplotlib() -> None:
    """Check that figures can be drawn. Called before a run, so that a long run does not fail at its end.

    Raises:
        EvaluationError: matplotlib is not installed.
    """
    try:
        import_module("matplotlib.figure")
    except ImportError:
        raise EvaluationError("A report needs matplotlib; run: pip install 'steer-engine[report]'.") from None


def curves(outcome: Outcome, verdict: Verdict) -> str:
    """Accuracy, KL, entropy and probability mass against strength at the chosen blocks, on validation.

    Bands are 95 % intervals.
    """
    line = _line(outcome, "validation", verdict)
    neutral = _line(outcome, "neutral", verdict)
    has_answers = "mass_correct" in line[0].metrics
    figure, axes = _figure(1, 4 if has_answers else 3, height=3.1)
    axes = axes[0]
    _band(axes[0], line, "accuracy", COLOURS[0], "")
    axes[0].axhline(_at_zero(line).metrics["accuracy"].mean, color=GREY, lw=0.8, ls=":")
    axes[0].set_title("accuracy")
    if "kl" in line[0].metrics:
        _band(axes[1], line, "kl", COLOURS[0], "task")
    _band(axes[1], neutral, "kl", COLOURS[4], "neutral text")
    axes[1].set_title("KL(P₀ ‖ Pα), nats")
    if "entropy" in line[0].metrics:
        _band(axes[2], line, "entropy", COLOURS[0], "task")
    _band(axes[2], neutral, "entropy", COLOURS[4], "neutral text")
    axes[2].set_title("entropy, bits")
    if has_answers:
        _band(axes[3], line, "mass_correct", COLOURS[2], "right answer")
        _band(axes[3], line, "mass_incorrect", COLOURS[1], "other answers")
        axes[3].set_title("probability mass")
    for axis in axes:
        axis.set_xlabel(f"strength α ({outcome.facts['unit']})")
        axis.axvline(verdict.alpha, color=GREY, lw=0.8, ls="--")
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=8, frameon=False)
    return _svg(figure)


def heat_map(outcome: Outcome, verdict: Verdict) -> str:
    """Change of accuracy on validation by blocks and strength. A frame marks the chosen cell."""
    own = [point for point in outcome.points if point.split == "validation" and point.vector == verdict.vector]
    baseline = _baseline(outcome, "validation").metrics["accuracy"].mean
    ranges = list(dict.fromkeys(point.blocks for point in own))
    alphas = sorted({point.alpha for point in own})
    grid = np.full((len(ranges), len(alphas)), np.nan)
    for point in own:
        row, column = ranges.index(point.blocks), alphas.index(point.alpha)
        grid[row, column] = point.metrics["accuracy"].mean - baseline
    figure, axes = _figure(1, 1, height=1.4 + 0.32 * len(ranges), width=max(5.0, 1.8 + 0.62 * len(alphas)))
    axis = axes[0][0]
    limit = max(0.02, float(np.nanmax(np.abs(grid))))
    picture = axis.imshow(grid, cmap="RdBu", vmin=-limit, vmax=limit, aspect="auto")
    axis.set_xticks(range(len(alphas)), [f"{alpha:g}" for alpha in alphas], fontsize=8)
    axis.set_yticks(range(len(ranges)), ranges, fontsize=8)
    axis.set_xlabel("strength α")
    axis.set_ylabel("blocks")
    if len(alphas) <= 24:
        for (row, column), value in np.ndenumerate(grid):
            colour = "white" if abs(value) > 0.6 * limit else "black"
            axis.text(column, row, f"{100 * value:+.0f}", ha="center", va="center", fontsize=7, color=colour)
    place = alphas.index(verdict.alpha) - 0.5, ranges.index(verdict.blocks) - 0.5
    axis.add_patch(import_module("matplotlib.patches").Rectangle(place, 1, 1, fill=False, lw=2))
    axis.set_title("change of accuracy, percentage points")
    figure.colorbar(picture, ax=axis, shrink=0.9)
    return _svg(figure)


def trials(outcome: Outcome, verdict: Verdict) -> str:
    """Accuracy on the test split of no steering, the chosen condition and each control.

    Bars are 95 % intervals of the difference from no steering.
    """
    figure, axes = _figure(1, 1, height=0.9 + 0.36 * (len(verdict.trials) + 1), width=7.0)
    axis = axes[0][0]
    before = verdict.main.paired.before
    names = ["no steering", *(trial.name for trial in verdict.trials)]
    axis.axvline(before, color=GREY, lw=0.8, ls=":")
    axis.plot([before], [0], "o", color=GREY)
    for row, trial in enumerate(verdict.trials, start=1):
        colour = COLOURS[5] if trial.is_control else COLOURS[0]
        ends = [before + trial.paired.difference.low, before + trial.paired.difference.high]
        axis.plot(ends, [row, row], color=colour, lw=2)
        axis.plot([trial.paired.after], [row], "o", color=colour)
    axis.set_yticks(range(len(names)), names, fontsize=8)
    axis.invert_yaxis()
    axis.set_title("accuracy on the test split")
    return _svg(figure)


def flips(verdict: Verdict) -> str:
    """Margin of the right answer of each test item, steered against unsteered; above 0 is right."""
    before, after = np.array(verdict.margins).T
    figure, axes = _figure(1, 1, height=4.2, width=4.6)
    axis = axes[0][0]
    gained, lost = (before <= 0) & (after > 0), (before > 0) & (after <= 0)
    same = ~(gained | lost)
    axis.plot(before[same], after[same], ".", color="#bbbbbb", ms=3, label=f"unchanged ({same.sum()})")
    axis.plot(before[gained], after[gained], ".", color=COLOURS[2], ms=4, label=f"now above 0 ({gained.sum()})")
    axis.plot(before[lost], after[lost], ".", color=COLOURS[1], ms=4, label=f"now below 0 ({lost.sum()})")
    ends = [float(min(before.min(), after.min())), float(max(before.max(), after.max()))]
    axis.plot(ends, ends, color=GREY, lw=0.6)
    axis.axhline(0, color=GREY, lw=0.6)
    axis.axvline(0, color=GREY, lw=0.6)
    axis.set_xlabel("margin unsteered, nats")
    axis.set_ylabel("margin steered, nats")
    axis.set_title("test items")
    axis.legend(fontsize=8, frameon=False)
    return _svg(figure)


def search(result: TaskResult, tries: Sequence[Try]) -> str:
    """Every try of a task on validation, as AUROC against accuracy; and the test items: gain and change of AUROC.

    Bars are 95 % intervals.
    """
    figure, axes = _figure(1, 3, height=1.4 + 0.27 * max(8, len(result.trials)), width=12.0)
    grid, gains, areas = axes[0]
    for colour, recipe in zip(COLOURS * len(tries), dict.fromkeys(each.recipe for each in tries), strict=False):
        own = [each.quality for each in tries if each.recipe == recipe]
        grid.plot([q.accuracy for q in own], [q.auroc for q in own], ".", color=colour, ms=5, label=recipe)
    plain = result.plain_validation
    grid.plot([plain.accuracy], [plain.auroc], "k*", ms=10, label="plain")
    grid.set_xlabel("accuracy")
    grid.set_ylabel("AUROC of the margin", fontsize=9)
    grid.set_title(f"{len(tries)} tries on validation items")
    grid.legend(fontsize=8, frameon=False)
    for row, trial in enumerate(result.trials):
        colour = COLOURS[0] if trial.name == "chosen" else COLOURS[4] if trial.is_prompt else COLOURS[5]
        for axis, change in ((gains, trial.paired.difference), (areas, trial.auroc_change)):
            axis.plot([change.low, change.high], [row, row], color=colour, lw=2)
            axis.plot([change.mean], [row], "o", color=colour, ms=4)
    for axis, title in ((gains, f"accuracy, {result.num_test} test items"), (areas, "AUROC, test items")):
        axis.axvline(0, color=GREY, lw=0.8, ls=":")
        axis.set_title(f"change of {title}")
        axis.invert_yaxis()
    gains.set_yticks(range(len(result.trials)), [trial.name for trial in result.trials], fontsize=8)
    areas.set_yticks([])
    return _svg(figure)


def condition(fit: ConditionFit, suffix: str) -> bytes:
    """The values of all prompts at the chosen blocks with the threshold, and the AUROC of each block.

    suffix: `.svg` or `.png`, the format of the returned file.
    """
    figure, axes = _figure(1, 2, height=3.4, width=9.0)
    values, areas = axes[0]
    chosen, cut = fit.chosen, fit.chosen.cut
    _classes(values, chosen.positive_N, chosen.negative_N)
    side = "above" if cut.above else "below"
    values.axvline(cut.threshold, color="black", lw=1.2, ls="--", label=f"holds {side} {cut.threshold:.4g}")
    values.set_xlabel(f"{fit.measure}, {fit.at}")
    values.set_ylabel("prompts, training and held-out", fontsize=9)
    values.set_title(f"block {', '.join(map(str, chosen.blocks))}: held-out F1 {chosen.held_out.f1:.3f}")
    values.legend(fontsize=8, frameon=False)
    blocks = list(fit.by_block)
    trained = [each.auroc for each in fit.by_block.values()]
    held_out = [each.held_out.auroc for each in fit.by_block.values()]
    areas.plot(blocks, trained, "o-", color=COLOURS[5], ms=3, lw=1.2, label="training prompts")
    areas.plot(blocks, held_out, "o-", color=COLOURS[4], ms=3, lw=1.2, label="held-out prompts")
    areas.axhline(0.5, color=GREY, lw=0.8, ls=":")
    for block in chosen.blocks:
        areas.axvline(block, color="black", lw=0.8, ls="--")
    areas.set_ylim(min(0.5, *held_out) - 0.05, 1.02)
    areas.set_xlim(blocks[0] - 1, blocks[-1] + 1)
    areas.set_xticks(blocks[:: 1 + len(blocks) // 12])
    areas.set_xlabel("block")
    areas.set_title("AUROC; 0.5 is chance")
    areas.legend(fontsize=8, frameon=False)
    return _bytes(figure, suffix)


def probe(report: ProbeReport, suffix: str) -> bytes:
    """ROC curves of the blocks; at the best one the values of both classes, and the calibration; AUROC per block.

    suffix: `.svg` or `.png`, the format of the returned file.
    """
    figure, ((roc, values), (calibration, areas)) = _figure(2, 2, height=6.8, width=9.0)
    best = report.by_block[report.best]
    for block, each in report.by_block.items():
        if block != report.best:
            roc.plot(*_roc(each.positive, each.negative), color="#cccccc", lw=0.8)
    roc.plot(
        *_roc(best.positive, best.negative), color=COLOURS[0], lw=2, label=f"block {report.best}: {best.auroc:.3f}"
    )
    roc.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls=":", label="chance: 0.500")
    if best.quality is not None:
        place = [best.quality.false_positive_rate], [best.quality.recall]
        roc.plot(*place, "o", color="black", ms=6, label="at the threshold", clip_on=False, zorder=5)
    roc.set_xlabel("false-positive rate")
    roc.set_ylabel("true-positive rate", fontsize=9)
    roc.set_title("ROC curve and its area" + (" (grey: the other blocks)" if len(report.by_block) > 1 else ""))
    roc.legend(fontsize=8, frameon=False, loc="lower right")
    _classes(values, best.positive.value_N, best.negative.value_N)
    if best.probe.threshold is not None:
        values.axvline(
            best.probe.threshold, color="black", lw=1.2, ls="--", label=f"fires above {best.probe.threshold:.4g}"
        )
    values.set_xlabel(f"<x, v>, {report.at}")
    values.set_ylabel("tokens" if report.at == "every_prompt_token" else "prompts", fontsize=9)
    values.set_title(f"block {report.best}: values of both classes")
    values.legend(fontsize=8, frameon=False)
    calibration.plot([0, 1], [0, 1], color=GREY, lw=0.8, ls=":")
    if best.probe.platt is not None:
        share_N = probabilities(best.probe.platt, np.concatenate([best.positive.value_N, best.negative.value_N]))
        label_N = np.repeat([1.0, 0.0], [len(best.positive.value_N), len(best.negative.value_N)])
        means, shares, counts = zip(*binned(share_N, label_N), strict=True)
        sizes = 20.0 + 180.0 * np.array(counts) / max(counts)
        calibration.scatter(means, shares, s=sizes, color=COLOURS[4], alpha=0.8, clip_on=False, zorder=5)
        calibration.set_title(f"calibration: ECE {best.calibration_error:.3f}, Brier {best.brier:.3f}")
        for mean, share, count in zip(means, shares, counts, strict=True):
            above = share < 0.5
            offset = (0, 9 if above else -9)
            calibration.annotate(
                str(count), (mean, share), offset, textcoords="offset points", fontsize=8, ha="center",
                va="bottom" if above else "top",
            )  # fmt: skip
    calibration.set_xlabel("probability, in bins of 0.1 with their counts")
    calibration.set_ylabel("share of positives", fontsize=9)
    blocks = list(report.by_block)
    area = np.array([each.auroc for each in report.by_block.values()])
    ends = np.array([[each.low, each.high] for each in report.by_block.values()]).T
    # The percentiles of a skewed bootstrap may leave out the estimate itself.
    areas.errorbar(
        blocks, area, np.maximum(0.0, [area - ends[0], ends[1] - area]), fmt="o-", color=COLOURS[5], ms=3, lw=1.2
    )
    areas.axhline(0.5, color=GREY, lw=0.8, ls=":")
    areas.axvline(report.best, color="black", lw=0.8, ls="--")
    areas.set_ylim(min(0.5, *ends[0]) - 0.05, 1.02)
    areas.set_xlim(blocks[0] - 1, blocks[-1] + 1)
    areas.set_xticks(blocks[:: 1 + len(blocks) // 12])
    areas.set_xlabel("block")
    areas.set_title("AUROC with 95 % interval; 0.5 is chance")
    return _bytes(figure, suffix)


def _roc(positive: Scores, negative: Scores) -> tuple[list[float], list[float]]:
    """False- and true-positive rates at all thresholds, from the highest."""
    cuts = np.unique(np.concatenate([positive.value_N, negative.value_N]))[::-1]
    rates = [
        np.searchsorted(np.sort(-side.value_N), -cuts, side="right") / len(side.value_N)
        for side in (negative, positive)
    ]
    false_positive, true_positive = ([0.0, *rate] for rate in rates)
    return false_positive, true_positive


def _classes(axis: Any, positive_N: Any, negative_N: Any) -> None:
    """Histograms of both classes with common edges."""
    both_N = np.concatenate([positive_N, negative_N])
    edges = np.histogram_bin_edges(both_N, bins=30 if len(both_N) > 100 else 20)
    for name, value_N, colour in (("positive", positive_N, COLOURS[0]), ("negative", negative_N, COLOURS[1])):
        axis.hist(value_N, edges, color=colour, alpha=0.55, label=f"{name} ({len(value_N)})")


def _bytes(figure: Any, suffix: str) -> bytes:
    if suffix == ".svg":
        return _svg(figure).encode()
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=150)
    return out.getvalue()


def _band(axis: Any, line: Sequence[Point], metric: str, colour: str, label: str) -> None:
    alphas = [point.alpha for point in line]
    interval = [point.metrics[metric] for point in line]
    axis.plot(alphas, [each.mean for each in interval], "o-", color=colour, ms=3, lw=1.4, label=label or None)
    low, high = [each.low for each in interval], [each.high for each in interval]
    axis.fill_between(alphas, low, high, color=colour, alpha=0.18, lw=0)


def _line(outcome: Outcome, split: str, verdict: Verdict) -> list[Point]:
    own = [
        point
        for point in outcome.points
        if point.split == split and point.vector == verdict.vector and point.blocks == verdict.blocks
    ]
    return sorted([*own, _baseline(outcome, split)], key=lambda point: point.alpha)


def _baseline(outcome: Outcome, split: str) -> Point:
    return next(point for point in outcome.points if point.split == split and not point.vector)


def _at_zero(line: Sequence[Point]) -> Point:
    return next(point for point in line if point.alpha == 0.0)


def _figure(rows: int, columns: int, *, height: float, width: float = 0.0) -> tuple[Any, Any]:
    figure = import_module("matplotlib.figure").Figure(figsize=(width or 3.5 * columns, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.tick_params(labelsize=8)
        axis.title.set_fontsize(10)
        axis.xaxis.label.set_fontsize(9)
    return figure, axes


def _svg(figure: Any) -> str:
    matplotlib = import_module("matplotlib")
    out = io.StringIO()
    # No date and fixed ids, so that equal numbers give equal files.
    with matplotlib.rc_context({"svg.hashsalt": "steer-engine", "svg.fonttype": "path"}):
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
