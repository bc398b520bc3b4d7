"""Writes results: the folder of an evaluation (JSON, CSV, HTML), the table of runs of the paper's protocol, and
the page of a search."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from steer_engine.evaluate import plots
from steer_engine.evaluate.outcome import Outcome, PaperRun, Trial, Verdict
from steer_engine.evaluate.plan import PAPER_METHODS
from steer_engine.evaluate.search_outcome import SearchOutcome
from steer_engine.vectors.storage import write_atomically

SIGNIFICANCE = 0.05
"""Holm-corrected p-values below this are called significant."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse; margin: .6rem 0 } td, th { padding: .2rem .8rem; text-align: right;
border-bottom: 1px solid #ddd; vertical-align: top } th:first-child, td:first-child { text-align: left }
td.text { text-align: left; white-space: pre-wrap; max-width: 26rem; font-size: .9em }
svg { max-width: 100%; height: auto } dt { float: left; width: 9rem; color: #666 } dd { margin-left: 9rem }
.verdict { font-size: 1.1em; border-left: 4px solid #2166ac; padding: .3rem .8rem; background: #f4f7fb }
.warning { border-left-color: #b2182b; background: #fbf3f2 } figure { margin: .5rem 0 }
"""


def write_results(outcome: Outcome, folder: Path) -> Path:
    """Write `results.json`, `results.csv` and `report.html`. Returns the path of the HTML page."""
    write_atomically(folder / "results.json", outcome.to_json().encode())
    write_atomically(folder / "results.csv", outcome.to_csv().encode())
    page = folder / "report.html"
    write_atomically(page, html_report(outcome).encode())
    return page


def write_search(outcome: SearchOutcome, folder: Path) -> Path:
    """Write `search.md`, `search.json`, `tries.csv` and one picture per task. Returns the path of the page."""
    page = folder / "search.md"
    write_atomically(folder / "search.json", outcome.to_json().encode())
    write_atomically(folder / "tries.csv", outcome.to_csv().encode())
    for result in outcome.results:
        own = [each for each in outcome.tries if each.task == result.task]
        write_atomically(folder / f"{result.file_name}.svg", plots.search(result, own).encode())
    write_atomically(page, outcome.to_markdown().encode())
    return page


def html_report(outcome: Outcome) -> str:
    """The HTML page of an evaluation. All text from tasks, models and users is escaped."""
    facts = outcome.facts
    title = f"{facts['task']} on {facts['model']}"
    sections = "".join(_section(outcome, verdict) for verdict in outcome.verdicts)
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style>\n<h1>{escape(title)}</h1>\n{_facts_list(outcome)}{sections}{_method(outcome)}</html>\n"
    )


def sentence(verdict: Verdict) -> str:
    """The result on the test split in one sentence."""
    trial = verdict.main
    paired = trial.paired
    interval = f"95 % interval {100 * paired.difference.low:+.1f} to {100 * paired.difference.high:+.1f}"
    moved = f"{100 * paired.before:.1f} % to {100 * paired.after:.1f} %"
    change = f"{100 * paired.difference.mean:+.1f} percentage points ({interval}; McNemar p = {paired.p:.2g}, "
    change += f"{trial.p_holm:.2g} after Holm)"
    if trial.p_holm >= SIGNIFICANCE:
        word = "No significant change of accuracy"
    else:
        word = "Accuracy rose" if paired.difference.mean > 0 else "Accuracy fell"
    return f"{word} on the test split: {moved}, {change}, at blocks {verdict.blocks}, α = {verdict.alpha:g}."


def warnings(verdict: Verdict) -> list[str]:
    """Reasons to doubt a gain, one sentence each."""
    found = [
        f"The control “{trial.name}” also raised accuracy ({100 * trial.paired.difference.mean:+.1f} points, p = "
        f"{trial.p_holm:.2g} after Holm). Part of any gain is unrelated to the contrast in the vector's pairs."
        for trial in verdict.controls
        if trial.p_holm < SIGNIFICANCE and trial.paired.difference.mean > 0
    ]
    if verdict.validation <= verdict.validation_baseline:
        found.append(
            "No strength was better than no steering on the validation split. The best strength was tested anyway."
        )
    return found


def _section(outcome: Outcome, verdict: Verdict) -> str:
    parts = [f'<h2>{escape(verdict.vector)}</h2><p class="verdict">{escape(sentence(verdict))}</p>']
    parts += [f'<p class="verdict warning">{escape(text)}</p>' for text in warnings(verdict)]
    parts.append(_trials_table(verdict))
    parts += [f"<figure>{picture}</figure>" for picture in _pictures(outcome, verdict)]
    if verdict.steerability is not None:
        parts.append(
            f"<p>Steerability (slope of the mean margin against α, validation): {verdict.steerability:+.3f} nats per "
            "unit of strength.</p>"
        )
    parts += [_flips_table(verdict), _examples_table(verdict)]
    return "".join(parts)


def _pictures(outcome: Outcome, verdict: Verdict) -> list[str]:
    drawn = [plots.curves(outcome, verdict), plots.heat_map(outcome, verdict), plots.trials(outcome, verdict)]
    return [*drawn, plots.flips(verdict)] if verdict.margins else drawn


def _trials_table(verdict: Verdict) -> str:
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
    return _table(heads, [_trial_row(trial) for trial in verdict.trials])


def _trial_row(trial: Trial) -> list[str]:
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


def _flips_table(verdict: Verdict) -> str:
    if not verdict.flips:
        return "<p>No test item changed.</p>"
    rows = [
        [flip.prompt, flip.answer, "gained" if flip.gained else "lost", f"{flip.before:+.2f}", f"{flip.after:+.2f}"]
        for flip in verdict.flips
    ]
    table = _table(["prompt", "right answer", "", "before", "after"], rows, text=2)
    return f"<details><summary>Items that changed (the first {len(rows)})</summary>{table}</details>"


def _examples_table(verdict: Verdict) -> str:
    rows = [[example.prompt, example.plain, example.steered] for example in verdict.examples]
    return f"<h3>How the model continues prompts</h3>{_table(['prompt', 'unsteered', 'steered'], rows, text=3)}"


def _facts_list(outcome: Outcome) -> str:
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
        "<h2>How to read this</h2><p>The validation split chose blocks and strength, by the mean "
        f"{escape(str(outcome.facts['score']))}. The test split was used once, for the chosen condition and its "
        "controls. Intervals are paired percentile bootstraps over items. p is McNemar's exact test, two-sided; "
        "“p, Holm” is corrected over all rows of all vectors. KL, entropy and probability mass are computed over the "
        "whole vocabulary at the first answer token. Bands are 95 % bootstrap intervals of the mean.</p>"
    )


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], *, text: int = 0) -> str:
    """An HTML table. Its first `text` columns are set as left-aligned text."""
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    body = "".join(
        "<tr>"
        + "".join(f"<td{' class=text' if place < text else ''}>{escape(cell)}</td>" for place, cell in enumerate(row))
        + "</tr>"
        for row in rows
    )
    return f"<table><tr>{head}</tr>{body}</table>"


PAPER_HEADS = (
    "task", "vector", "blocks", "α", "picked on n", "accuracy there: α = 0", "best α", "test n", "test: α = 0",
    "test: chosen α", "change, 95 % interval", "p", "p, Holm", "best control", "neutral KL",
)  # fmt: skip


def paper_markdown(runs: Sequence[PaperRun]) -> str:
    """A Markdown page with the settings and one table of all tasks."""
    facts = runs[0].paper.facts
    machine = ", ".join(f"{name} {value}" for name, value in facts["machine"].items())
    versions = ", ".join(f"{name} {value}" for name, value in facts["versions"].items())
    lines = [
        f"# The paper's protocol on {facts['model']}",
        "",
        f"{facts['dtype']}, seed {facts['seed']}; {machine}; {versions}.",
        "",
        f"`{facts['command']}`",
        "",
        "| " + " | ".join(PAPER_HEADS) + " |",
        "|" + "---|" * len(PAPER_HEADS),
        *("| " + " | ".join(row) + " |" for run in runs for row in _paper_rows(run)),
        "",
        "“Accuracy there, best α” is the paper's number: the best accuracy over all strengths, on the items that chose "
        "the strength. It is too high by construction. The test columns use items that chose nothing.",
        "",
    ]
    return "\n".join(lines)


def paper_index(runs: Sequence[PaperRun]) -> str:
    """An HTML page with links to the report of every run."""
    links = "".join(
        f'<li>{escape(run.task)}: <a href="{escape(folder_of(run.task))}/paper/report.html">paper</a>, '
        f'<a href="{escape(folder_of(run.task))}/ours/report.html">ours</a></li>'
        for run in runs
    )
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Paper protocol</title><ul>{links}</ul></html>\n'
    )


def folder_of(task: str) -> str:
    """Folder name of a task in the paper's results."""
    return "".join(letter if letter.isalnum() else "-" for letter in task)


def _paper_rows(run: PaperRun) -> list[list[str]]:
    """One row per vector, with the columns of `PAPER_HEADS`."""
    made = []
    for outcome in (run.paper, run.ours):
        sizes = outcome.facts["sizes"]
        for verdict in outcome.verdicts:
            method = verdict.vector.rsplit("-", 1)[0]
            name = PAPER_METHODS[method] if outcome is run.paper else f"ours: {verdict.vector}"
            trial, paired = verdict.main, verdict.main.paired
            best = max(verdict.controls, key=lambda control: control.paired.after)
            made.append([
                run.task, name, verdict.blocks, f"{verdict.alpha:g}",
                str(sizes["validation"]), f"{verdict.validation_baseline:.3f}", f"{verdict.validation:.3f}",
                str(sizes["test"]), f"{paired.before:.3f}", f"{paired.after:.3f}",
                f"{paired.difference.mean:+.3f} ({paired.difference.low:+.3f} to {paired.difference.high:+.3f})",
                f"{paired.p:.2g}", f"{trial.p_holm:.2g}", f"{best.paired.after:.3f} ({best.name})",
                f"{trial.neutral_kl:.3f}",
            ])  # fmt: skip
    return made
