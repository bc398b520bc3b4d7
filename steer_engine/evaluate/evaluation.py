"""Runs an evaluation: derives or loads vectors, scores conditions, and compares them with controls.

`Evaluation` runs one plan on one task. `run_paper` runs two: the protocol of Højer et al. (ICLR 2025), and ours.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from steer_engine.derive.capture_engine import installed_versions
from steer_engine.derive.progress import Progress
from steer_engine.errors import EvaluationError
from steer_engine.evaluate.conditions import (
    BASELINE,
    Condition,
    Contrast,
    as_long_as,
    contrasts,
    random_like,
    with_shuffled_labels,
)
from steer_engine.evaluate.encode import Encoder, Question
from steer_engine.evaluate.items import Item, Task
from steer_engine.evaluate.journal import Journal
from steer_engine.evaluate.outcome import Example, Flip, Outcome, PaperRun, Point, Trial, Verdict, machine
from steer_engine.evaluate.plan import Plan, Recipe, paper_plans
from steer_engine.evaluate.prompt_vectors import IdPair, Side, capture_sides, digest_name, safe_name, vector_of
from steer_engine.evaluate.report import write_results
from steer_engine.evaluate.scorer import Scorer
from steer_engine.evaluate.statistics import Paired, compare, holm, slope
from steer_engine.evaluate.sweep import Table, choose, sweep
from steer_engine.evaluate.tasks import neutral_texts
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.files import load, save

if TYPE_CHECKING:
    from steer_engine.llm import LLM


MAX_FLIPS = 40
"""Changed items listed in a report."""

NUM_EXAMPLES = 6
EXAMPLE_TOKENS = 24
"""Continuations shown in a report, and their length."""

_ABOUT = {
    "flipped": "the same vector with the opposite sign",
    "random": "a random direction with the norm of the vector at each block",
    "shuffled": "the same method with the labels of half of the pairs swapped, scaled to the same norm at each block",
}


@dataclass(frozen=True, kw_only=True)
class _Tried:
    """A vector, its grid, the condition that validation chose, and the conditions to run on the test split by name."""

    vector: ControlVector
    grid: list[Condition]
    chosen: Condition
    trials: dict[str, Condition]


class Evaluation:
    """One task and one plan on one engine.

    folder: for the journal and the derived vectors. A second run with the same settings resumes from them.
    model: name or path given by the user. generate: number of tokens generated for an exact match.
    command: command line shown in the report.

    Raises:
        EvaluationError: an item or a block range does not fit the model. Raised before anything is measured.
        ModelMismatchError: a vector belongs to another model.
    """

    def __init__(
        self,
        llm: LLM,
        task: Task,
        plan: Plan,
        folder: Path,
        *,
        model: str,
        chat: bool = False,
        generate: int = 32,
        command: str = "",
        progress: bool = True,
    ) -> None:
        self._llm, self._task, self._plan, self._folder = llm, task, plan, folder
        self._model, self._command, self._progress = model, command, progress
        self._encoder = Encoder(llm.get_tokenizer(), max_tokens=int(llm.model_config.max_model_len), chat=chat)
        self._scorer = Scorer(llm, generate=generate)
        self._questions: dict[str, list[Question]] = {
            split: self._encoder.questions(getattr(task, split), generate=generate) for split in ("validation", "test")
        }
        self._questions["neutral"] = self._encoder.neutral(neutral_texts())
        self._sides: dict[str, tuple[Side, Side]] = {}
        for name, vector in plan.vectors.items():
            vector.check(hidden_size=llm.hidden_size, num_blocks=llm.num_blocks)
            plan.grid(name, vector, llm.num_blocks)
        plan.blocks_for(llm.num_blocks)
        for recipe in plan.recipes:
            contrasts(task.derive, recipe.against)
        self._facts = {
            "model": model,
            "task": task.name,
            "about": task.about,
            "task_digest": task.digest,
            "sizes": {split: len(getattr(task, split)) for split in ("derive", "validation", "test")},
            "seed": plan.seed,
            "chat": chat,
            "generate": generate,
            "dtype": str(llm.model_config.dtype).removeprefix("torch."),
            "versions": installed_versions(),
        }

    def run(self) -> Outcome:
        """Measure everything that the journal lacks, and return the result."""
        with Progress(enabled=self._progress) as shown, Journal(self._folder / "scores.jsonl", self._facts) as journal:
            vectors = self._vectors(shown)
            grids = {name: self._plan.grid(name, vector, self._llm.num_blocks) for name, vector in vectors.items()}
            everything = [BASELINE, *(condition for grid in grids.values() for condition in grid)]
            validation = self._sweep(journal, shown, "validation", everything)
            # With a bound on KL, neutral texts run for every condition before the choice.
            neutral = self._sweep(journal, shown, "neutral", everything) if self._plan.max_kl is not None else None
            tried = {}
            for name, vector in vectors.items():
                chosen = choose(grids[name], validation, self._plan.score, neutral=neutral, max_kl=self._plan.max_kl)
                if chosen is None:
                    raise EvaluationError(
                        f"Every strength of {name} has a mean KL above {self._plan.max_kl:g} on neutral texts; "
                        "try smaller strengths (--alphas), or a larger --max-kl."
                    )
                trials = self._trials(shown, name, vector, chosen)
                tried[name] = _Tried(vector=vector, grid=grids[name], chosen=chosen, trials=trials)
            finals = [BASELINE, *(condition for each in tried.values() for condition in each.trials.values())]
            test = self._sweep(journal, shown, "test", finals)
            # For the curves of the report: all strengths at the chosen blocks.
            along = [c for each in tried.values() for c in each.grid if c.blocks == each.chosen.blocks]
            neutral = self._sweep(journal, shown, "neutral", [*finals, *along])
            verdicts = self._verdicts(tried, validation, test, neutral)
        points = [
            Point.of(split, condition, tables[condition.key])
            for split, conditions, tables in (
                ("validation", everything, validation),
                ("test", finals, test),
                ("neutral", [*finals, *along], neutral),
            )
            for condition in {condition.key: condition for condition in conditions}.values()
        ]
        plan = self._plan
        settings = {
            "alphas": plan.alphas, "unit": plan.unit, "scope": plan.scope, "preserve_norm": plan.preserve_norm,
            "score": plan.score, "max_kl": plan.max_kl,
        }  # fmt: skip
        facts = {**self._facts, **settings, "machine": machine(), "command": self._command}
        return Outcome(facts=facts, points=points, verdicts=verdicts)

    def _sweep(
        self, journal: Journal, shown: Progress, split: str, conditions: Sequence[Condition]
    ) -> dict[str, Table]:
        questions = self._questions[split]
        total = len(questions) * len({condition.key for condition in conditions})
        with shown.counting(f"scoring {split}:", total=total, unit="answers") as advance:
            return sweep(self._scorer, journal, split, questions, conditions, advance)

    def _vectors(self, shown: Progress) -> dict[str, ControlVector]:
        derived = {
            recipe.name: self._derived(recipe.name, shown, recipe, shuffled=False) for recipe in self._plan.recipes
        }
        vectors = {**derived, **self._plan.vectors}
        for vector in vectors.values():
            self._llm.vectors.add(digest_name(vector), vector)
        return vectors

    def _derived(self, name: str, shown: Progress, recipe: Recipe, *, shuffled: bool) -> ControlVector:
        """The vector of a recipe. An interrupted run loads the file that it wrote before."""
        path = self._folder / "vectors" / f"{safe_name(name)}.safetensors"
        if path.exists():
            return load(path)
        pairs = contrasts(self._task.derive, recipe.against, seed=self._plan.seed)
        if shuffled:
            pairs = with_shuffled_labels(pairs, seed=self._plan.seed)
        contrast = f"{recipe.against}{' shuffled' if shuffled else ''}"
        if contrast not in self._sides:
            with shown.counting(f"capturing {contrast}:", total=len(pairs), unit="pairs") as advance:
                self._sides[contrast] = capture_sides(self._llm, [self._ids(pair) for pair in pairs], advance)
        notes = f"{len(pairs)} pairs of task {self._task.name}, right answers against {contrast}."
        vector = vector_of(self._llm, self._sides[contrast], recipe.method, model=self._model, notes=notes)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(vector, path)
        return vector

    def _ids(self, pair: Contrast) -> IdPair:
        return self._encoder.ids(*pair.positive), self._encoder.ids(*pair.negative)

    def _trials(self, shown: Progress, name: str, vector: ControlVector, chosen: Condition) -> dict[str, Condition]:
        """Conditions that run on the test split besides the baseline: the chosen one and its controls, by name."""
        plan = self._plan
        trials = {
            "chosen": chosen,
            "flipped": plan.condition(f"{name}, flipped", vector, chosen.blocks, -chosen.alpha),
        }
        others = {
            f"random {number + 1}" if plan.random_controls > 1 else "random": random_like(
                vector, seed=plan.seed + number
            )
            for number in range(plan.random_controls)
        }
        # A vector file does not contain its pairs; the control uses pairs of the task instead.
        recipe = next(
            (recipe for recipe in plan.recipes if recipe.name == name),
            Recipe(method="diffmean", against="wrong" if self._task.kind == "choice" else "random"),
        )
        shuffled = self._derived(f"{recipe.name}-shuffled", shown, recipe, shuffled=True)
        others["shuffled"] = as_long_as(vector, dict(shuffled.directions), method="control: shuffled labels")
        for kind, other in others.items():
            self._llm.vectors.add(digest_name(other), other)
            trials[kind] = plan.condition(f"{name}, {kind}", other, chosen.blocks, chosen.alpha)
        return trials

    def _verdicts(
        self,
        tried: Mapping[str, _Tried],
        validation: Mapping[str, Table],
        test: Mapping[str, Table],
        neutral: Mapping[str, Table],
    ) -> list[Verdict]:
        before = test[BASELINE.key]
        paired: dict[tuple[str, str], Paired] = {
            (name, kind): compare(before["accuracy"], test[condition.key]["accuracy"], seed=self._plan.seed)
            for name, each in tried.items()
            for kind, condition in each.trials.items()
        }
        labels = {f"{name}|{kind}": (name, kind) for name, kind in paired}
        corrected = holm({label: paired[key].p for label, key in labels.items()})
        verdicts = []
        for name, each in tried.items():
            trials = [
                Trial(
                    name=kind,
                    is_control=kind != "chosen",
                    blocks=condition.blocks,
                    alpha=condition.alpha,
                    paired=paired[name, kind],
                    p_holm=corrected[f"{name}|{kind}"],
                    neutral_kl=float(neutral[condition.key]["kl"].mean()),
                    about=_ABOUT.get(kind.split()[0], ""),
                )
                for kind, condition in each.trials.items()
            ]
            after = test[each.chosen.key]
            verdicts.append(
                Verdict(
                    vector=name,
                    digest=each.vector.digest,
                    blocks=each.chosen.blocks,
                    alpha=each.chosen.alpha,
                    validation=float(validation[each.chosen.key][self._plan.score].mean()),
                    validation_baseline=float(validation[BASELINE.key][self._plan.score].mean()),
                    steerability=_steerability(each, validation),
                    trials=trials,
                    flips=_flips(self._task.test, before, after),
                    margins=_margins(before, after),
                    examples=self._examples(each.chosen),
                )
            )
        return verdicts

    def _examples(self, chosen: Condition) -> list[Example]:
        questions = self._questions["neutral"][:2] + self._questions["test"][: NUM_EXAMPLES - 2]
        prompts = neutral_texts()[:2] + [item.prompt for item in self._task.test[: NUM_EXAMPLES - 2]]
        plain = self._scorer.continuations(questions, BASELINE, EXAMPLE_TOKENS)
        steered = self._scorer.continuations(questions, chosen, EXAMPLE_TOKENS)
        return [Example(prompt=p, plain=a, steered=b) for p, a, b in zip(prompts, plain, steered, strict=True)]


def run_paper(
    llm: LLM, task: Task, folder: Path, *, alphas: Sequence[float], seed: int, model: str, **settings: Any
) -> PaperRun:
    """Run the paper's protocol and ours on one task. Each writes its report to its own folder and can be resumed.

    Raises:
        EvaluationError, DerivationError: the task does not fit the model, or its texts give no direction.
    """
    outcomes = {}
    for name, plan in paper_plans(llm.num_blocks, alphas, seed).items():
        outcome = Evaluation(llm, task, plan, folder / name, model=model, **settings).run()
        write_results(outcome, folder / name)
        outcomes[name] = outcome
    return PaperRun(task=task.name, paper=outcomes["paper"], ours=outcomes["ours"])


def _steerability(tried: _Tried, validation: Mapping[str, Table]) -> float | None:
    if "margin" not in validation[BASELINE.key]:
        return None
    line = [BASELINE, *(condition for condition in tried.grid if condition.blocks == tried.chosen.blocks)]
    alphas = np.array([condition.alpha for condition in line])
    return slope(alphas, np.array([validation[condition.key]["margin"].mean() for condition in line]))


def _flips(items: Sequence[Item], before: Table, after: Table) -> list[Flip]:
    changed = np.flatnonzero(before["accuracy"] != after["accuracy"])[:MAX_FLIPS]
    shown = "margin" if "margin" in before else "accuracy"
    return [
        Flip(
            prompt=items[i].prompt,
            answer=items[i].target,
            gained=bool(after["accuracy"][i]),
            before=float(before[shown][i]),
            after=float(after[shown][i]),
        )
        for i in changed
    ]


def _margins(before: Table, after: Table) -> list[tuple[float, float]]:
    if "margin" not in before:
        return []
    return [(round(float(a), 4), round(float(b), 4)) for a, b in zip(before["margin"], after["margin"], strict=True)]
