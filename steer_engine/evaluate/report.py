"""The folder of an evaluation: results as JSON and CSV, and the page."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from steer_engine.evaluate import plots
from steer_engine.evaluate.outcome import Outcome, Trial, Verdict
from steer_engine.vectors.storage import write_atomically


def write_results(outcome: Outcome, folder: Path) -> Path:
    """Write `results.json`, `results.csv` and `report.html`; returns the page's path."""
    write_atomically(folder / "results.json", outcome.to_json().encode())
    write_atomically(folder / "results.csv", outcome.to_csv().encode())
    page = folder / "report.html"
    write_atomically(page, html_report(outcome).encode())
    return page


LEVEL = 0.05

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .6rem 0 } td, th { padding: .2rem .8rem; text-align: right;
border-bottom: 1px solid #ddd; vertical-align: top } th:first-child, td:first-child { text-align: left }
td.text { text-align: left; white-space: pre-wrap; max-width: 26rem; font-size: .9em }
svg { max-width: 100%; height: auto } dt { float: left; width: 9rem; color: #666 } dd { margin-left: 9rem }
.verdict { font-size: 1.1em; border-left: 4px solid #2166ac; padding: .3rem .8rem; background: #f4f7fb }
.warning { border-left-color: #b2182b; background: #fbf3f2 } figure { margin: .5rem 0 }
"""


def html_report(outcome: Outcome) -> str:
    """The page. Everything that comes from a task, a model or a user is escaped."""
    facts = outcome.facts
    title = f"{facts['task']} on {facts['model']}"
    sections = "".join(_section(outcome, verdict) for verdict in outcome.verdicts)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style>\n<h1>{escape(title)}</h1>\n{_facts(outcome)}{sections}{_method(outcome)}</html>\n"
    )


def sentence(verdict: Verdict) -> str:
    """What the test split says, in one sentence."""
    trial = verdict.main
    paired = trial.paired
    interval = f"95 % interval {100 * paired.difference.low:+.1f} to {100 * paired.difference.high:+.1f}"
    moved = f"{100 * paired.before:.1f} % to {100 * paired.after:.1f} %"
    change = f"{100 * paired.difference.mean:+.1f} percentage points ({interval}; McNemar p = {paired.p:.2g}, "
    change += f"{trial.p_holm:.2g} after Holm)"
    if trial.p_holm >= LEVEL:
        word = "No significant change of accuracy"
    else:
        word = "Accuracy rose" if paired.difference.mean > 0 else "Accuracy fell"
    return f"{word} on the test split: {moved}, {change}, at blocks {verdict.blocks}, α = {verdict.alpha:g}."


def warnings(verdict: Verdict) -> list[str]:
    """What should keep a reader from believing a gain."""
    found = [
        f"The control “{trial.name}” improved the score as well ({100 * trial.paired.difference.mean:+.1f} points, p = "
        f"{trial.p_holm:.2g} after Holm): a part of any gain has nothing to do with what the vector was made of."
        for trial in verdict.controls
        if trial.p_holm < LEVEL and trial.paired.difference.mean > 0
    ]
    if verdict.validation <= verdict.validation_baseline:
        found.append("No strength was better than no steering on the validation split; the best of them was tested.")
    return found


def _section(outcome: Outcome, verdict: Verdict) -> str:
    parts = [f'<h2>{escape(verdict.vector)}</h2><p class="verdict">{escape(sentence(verdict))}</p>']
    parts += [f'<p class="verdict warning">{escape(text)}</p>' for text in warnings(verdict)]
    parts.append(_trials(verdict))
    parts += [f"<figure>{picture}</figure>" for picture in _pictures(outcome, verdict)]
    if verdict.steerability is not None:
        parts.append(
            f"<p>Steerability (slope of the mean margin against α, validation): {verdict.steerability:+.3f} nats per "
            "unit of strength.</p>"
        )
    parts += [_flips(verdict), _examples(verdict)]
    return "".join(parts)


def _pictures(outcome: Outcome, verdict: Verdict) -> list[str]:
    drawn = [plots.curves(outcome, verdict), plots.heat_map(outcome, verdict), plots.trials(outcome, verdict)]
    return [*drawn, plots.flips(verdict)] if verdict.margins else drawn


def _trials(verdict: Verdict) -> str:
    heads = [
        "test split",
        "α",
        "accuracy",
        "change",
        "95 % interval",
        "gained / lost",
        "p",
        "p, Holm",
        "neutral KL",
        "",
    ]
    return _grid(heads, [_trial(trial) for trial in verdict.trials])


def _trial(trial: Trial) -> list[str]:
    paired = trial.paired
    return [
        f"control: {trial.name}" if trial.is_control else trial.name,
        f"{trial.alpha:g}",
        f"{100 * paired.after:.1f} %",
        f"{100 * paired.difference.mean:+.1f}",
        f"{100 * paired.difference.low:+.1f} to {100 * paired.difference.high:+.1f}",
        f"{paired.gained} / {paired.lost}",
        f"{paired.p:.2g}",
        f"{trial.p_holm:.2g}",
        f"{trial.neutral_kl:.3f}",
        trial.about,
    ]


def _flips(verdict: Verdict) -> str:
    if not verdict.flips:
        return "<p>No test item changed.</p>"
    rows = [
        [flip.prompt, flip.answer, "gained" if flip.gained else "lost", f"{flip.before:+.2f}", f"{flip.after:+.2f}"]
        for flip in verdict.flips
    ]
    table = _grid(["prompt", "right answer", "", "before", "after"], rows, text=2)
    return f"<details><summary>Items that changed (the first {len(rows)})</summary>{table}</details>"


def _examples(verdict: Verdict) -> str:
    rows = [[example.prompt, example.plain, example.steered] for example in verdict.examples]
    return f"<h3>What the model goes on to write</h3>{_grid(['prompt', 'unsteered', 'steered'], rows, text=3)}"


def _facts(outcome: Outcome) -> str:
    facts = outcome.facts
    listed = {
        "task": f"{facts['about']} ({facts['task_digest'][:19]})",
        "items": ", ".join(f"{count} {name}" for name, count in facts["sizes"].items()),
        "dtype": facts["dtype"],
        "machine": ", ".join(f"{name} {value}" for name, value in facts["machine"].items()),
        "versions": ", ".join(f"{name} {value}" for name, value in facts["versions"].items()),
        "seed": str(facts["seed"]),
        "command": facts["command"],
    }
    return (
        "<dl>" + "".join(f"<dt>{key}</dt><dd>{escape(value)}</dd>" for key, value in listed.items() if value) + "</dl>"
    )


def _method(outcome: Outcome) -> str:
    return (
        "<h2>How to read this</h2><p>Blocks and strength were chosen on the validation split by the mean "
        f"{escape(str(outcome.facts['score']))}; the test split was used once, for the chosen point and its controls. "
        "Intervals are paired percentile bootstraps over items; p is McNemar's exact test, two-sided, Holm-corrected "
        "over all rows of all vectors. KL, entropy and mass are of the whole vocabulary at the first answer token; "
        "bands are 95 % bootstrap intervals of the mean.</p>"
    )


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]], *, text: int = 0) -> str:
    """A table whose first `text` columns are running text."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=text' if place < text else ''}>{escape(cell)}</td>" for place, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"
