"""The protocol of Højer et al. (ICLR 2025) on one task, and a stricter one beside it.

Theirs: three vectors (Reading, Contrastive, PCA contrastive) from prompts with their answers against random text, one
middle block, and the best strength's accuracy on the very items that the strength was picked on. Ours: the same
vectors on items that nothing was picked on, with controls; and a vector of right against wrong answers, whose blocks
are chosen as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from steer_engine.evaluate.evaluation import Evaluation
from steer_engine.evaluate.items import Task
from steer_engine.evaluate.outcome import Outcome
from steer_engine.evaluate.plan import Plan, Recipe
from steer_engine.evaluate.report import write_results

if TYPE_CHECKING:
    from steer_engine.llm import LLM


METHODS = {"mean": "Reading", "diffmean": "Contrastive", "pca_centred": "PCA contrastive"}
"""Our name of a method -> the paper's."""

OURS = Recipe(method="diffmean", against="wrong")

HEADS = (
    "task", "vector", "blocks", "α", "picked on n", "accuracy there: α = 0", "best α", "test n", "test: α = 0",
    "test: chosen α", "change, 95 % interval", "p", "p, Holm", "best control", "neutral KL",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class PaperRun:
    """Both protocols on one task."""

    task: str
    paper: Outcome
    ours: Outcome


def run_paper(
    llm: LLM, task: Task, folder: Path, *, alphas: Sequence[float], seed: int, model: str, **settings: Any
) -> PaperRun:
    """Run both on one engine; each leaves its report in a folder of its own and goes on from there when started again.

    Raises:
        EvaluationError, DerivationError: the task does not fit the model, or its texts give no direction.
    """
    theirs = Plan(
        recipes=tuple(Recipe(method=method, against="random") for method in METHODS),
        blocks=(str(llm.num_blocks // 2),),
        alphas=tuple(alphas),
        seed=seed,
    )
    outcomes = {}
    for name, plan in (("paper", theirs), ("ours", Plan(recipes=(OURS,), seed=seed))):
        outcome = Evaluation(llm, task, plan, folder / name, model=model, **settings).run()
        write_results(outcome, folder / name)
        outcomes[name] = outcome
    return PaperRun(task=task.name, paper=outcomes["paper"], ours=outcomes["ours"])


def rows(run: PaperRun) -> list[list[str]]:
    """One line per vector, in the order of `HEADS`."""
    made = []
    for outcome in (run.paper, run.ours):
        sizes = outcome.facts["sizes"]
        for verdict in outcome.verdicts:
            method = verdict.vector.rsplit("-", 1)[0]
            name = METHODS[method] if outcome is run.paper else f"ours: {verdict.vector}"
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


def markdown(runs: Sequence[PaperRun]) -> str:
    """All tasks as one table, under what was run."""
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
        "| " + " | ".join(HEADS) + " |",
        "|" + "---|" * len(HEADS),
        *("| " + " | ".join(row) + " |" for run in runs for row in rows(run)),
        "",
        "“Accuracy there, best α” is the paper's number: the best of all strengths on the items that it was picked on, "
        "which is too high by construction. The test columns are of items that nothing was picked on.",
        "",
    ]
    return "\n".join(lines)


def index_page(runs: Sequence[PaperRun]) -> str:
    """Links to the pages of every run."""
    links = "".join(
        f'<li>{escape(run.task)}: <a href="{escape(folder_of(run.task))}/paper/report.html">paper</a>, '
        f'<a href="{escape(folder_of(run.task))}/ours/report.html">ours</a></li>'
        for run in runs
    )
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>Paper protocol</title><ul>{links}</ul></html>\n'
    )


def folder_of(task: str) -> str:
    """Name of a task's folder."""
    return "".join(letter if letter.isalnum() else "-" for letter in task)
