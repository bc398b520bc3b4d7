"""Searches for a gain: every task, recipe, block and strength on validation items, then one point per task on the test.

All tries go to one journal, so that an interrupted search resumes. The point of each task is written to
`preregistered.json` before its test items run; a folder whose test items were used is never searched again with another
result.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from steer_engine.derive.capture_engine import installed_versions
from steer_engine.derive.progress import Progress
from steer_engine.errors import EvaluationError
from steer_engine.evaluate.conditions import BASELINE, Condition, as_long_as, random_like
from steer_engine.evaluate.encode import Encoder, Question
from steer_engine.evaluate.items import SPLITS, Item, Task
from steer_engine.evaluate.journal import Journal
from steer_engine.evaluate.outcome import machine
from steer_engine.evaluate.plan import require_blocks
from steer_engine.evaluate.prompt_vectors import (
    ABOUT,
    INSTRUCTION,
    Kind,
    Side,
    capture_sides,
    digest_name,
    mean_tokens,
    prompt_pairs,
    safe_name,
    shots_of,
    split_pool,
    vector_of,
    with_shuffled_sides,
)
from steer_engine.evaluate.quality import (
    Classes,
    Quality,
    auroc_difference,
    fixed_preference,
    margins,
    problems,
    quality,
    require_classes,
)
from steer_engine.evaluate.scorer import Scorer
from steer_engine.evaluate.search_outcome import SearchOutcome, SearchTrial, TaskResult, Try
from steer_engine.evaluate.statistics import compare, holm
from steer_engine.evaluate.sweep import Table, sweep
from steer_engine.evaluate.tasks import neutral_texts
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.files import load, save
from steer_engine.vectors.storage import write_atomically

if TYPE_CHECKING:
    from steer_engine.llm import LLM

SCOPE = "last_prompt_token"
"""Where the vectors are applied: at the token at which they were captured."""

Score = Literal["accuracy", "balanced", "auroc"]

DEFAULT_BLOCKS = 8
"""Single blocks that are tried if none are given, evenly over the depth."""

PREREGISTERED = "preregistered.json"


@dataclass(frozen=True, kw_only=True)
class SearchPlan:
    """The grid and the settings of a search.

    recipes, blocks, alphas: the grid; without blocks, some of all depths. score: measure to maximise on validation;
    ties go to the larger probability of the right answers, then to the smaller strength. shots: solved examples of the
    recipes, and of the few-shot prompt. instruction: text before the prompt, for the recipe and as a prompt. anyway:
    search tasks without headroom too.
    """

    recipes: tuple[Kind, ...]
    blocks: tuple[str, ...]
    alphas: tuple[float, ...]
    score: Score = "accuracy"
    shots: int = 10
    instruction: str = INSTRUCTION
    random_controls: int = 5
    seed: int = 0
    anyway: bool = False

    def __post_init__(self) -> None:
        if not self.recipes or len(set(self.recipes)) < len(self.recipes):
            raise EvaluationError("Give each recipe once, and at least one (--recipe).")
        if not any(self.alphas):
            raise EvaluationError("All strengths are 0; give other strengths, such as --alphas=0.5,1,2.")
        if self.shots < 1:
            raise EvaluationError(f"{self.shots} solved examples are too few; give at least 1 (--shots).")


@dataclass(frozen=True, kw_only=True)
class _Chosen:
    """The point that validation chose for a task. kind: recipe of the vector."""

    kind: Kind
    vector: ControlVector
    condition: Condition


class Search:
    """A search over tasks on one engine.

    folder: for the journal, the vectors and the pre-registered points. A second run with the same settings resumes.

    Raises:
        EvaluationError: a task, a block or a setting does not fit. Raised before anything is measured.
    """

    def __init__(
        self,
        llm: LLM,
        tasks: Sequence[Task],
        plan: SearchPlan,
        folder: Path,
        *,
        model: str,
        chat: bool = False,
        command: str = "",
        progress: bool = True,
    ) -> None:
        self._llm, self._plan, self._folder, self._model = llm, plan, folder, model
        self._command, self._progress = command, progress
        self._tasks = {task.name: task for task in tasks}
        if len(self._tasks) < len(tasks):
            raise EvaluationError(f"A task is given twice: {', '.join(task.name for task in tasks)}; give each once.")
        require_blocks(plan.blocks, llm.num_blocks)
        every = max(1, llm.num_blocks // DEFAULT_BLOCKS)
        self._blocks = plan.blocks or tuple(map(str, range(every // 2, llm.num_blocks - 1, every)))
        self._encoder = Encoder(llm.get_tokenizer(), max_tokens=int(llm.model_config.max_model_len), chat=chat)
        self._scorer = Scorer(llm, keep_answers=True)
        self._classes: dict[tuple[str, str], Classes] = {}
        self._questions: dict[tuple[str, str], list[Question]] = {}
        self._sides: dict[tuple[str, Kind], tuple[Side, Side]] = {}
        for task in tasks:
            examples, _ = split_pool(task.derive, plan.shots)
            for split in SPLITS:
                items: tuple[Item, ...] = getattr(task, split)
                self._classes[task.name, split] = require_classes(task.name, items)
                self._add_questions(task.name, split, items)
            self._add_questions(task.name, "few-shot prompt", [i.after(shots_of(examples[0])) for i in task.test])
            self._add_questions(task.name, "instruction prompt", [i.after(plan.instruction) for i in task.test])
            self._questions[task.name, "neutral"] = self._encoder.neutral(neutral_texts())
        self._facts: dict[str, Any] = {
            "model": model,
            "tasks": {task.name: task.digest for task in tasks},
            "sizes": {name: {s: len(getattr(task, s)) for s in SPLITS} for name, task in self._tasks.items()},
            "seed": plan.seed,
            "shots": plan.shots,
            "instruction": plan.instruction,
            "chat": chat,
            "dtype": str(llm.model_config.dtype).removeprefix("torch."),
            "versions": installed_versions(),
        }

    def _add_questions(self, task: str, name: str, items: Sequence[Item]) -> None:
        self._questions[task, name] = self._encoder.questions(items)

    def run(self) -> SearchOutcome:
        """Measure everything that the journal lacks, and return the result.

        Raises:
            EvaluationError: a task has no headroom on this model (see `SearchPlan.anyway`), or another point of this
                folder was already tested.
        """
        with Progress(enabled=self._progress) as shown, Journal(self._folder / "tries.jsonl", self._facts) as journal:
            plain = {name: self._plain(journal, shown, name) for name in self._tasks}
            headroom = {name: problems(plain[name], self._classes[name, "validation"]) for name in self._tasks}
            self._require_headroom(headroom)
            tries: list[Try] = []
            chosen: dict[str, _Chosen] = {}
            for name in self._tasks:
                found, chosen[name] = self._explore(journal, shown, name)
                tries += found
            self._preregister(chosen)
            results = self._test(journal, shown, chosen, plain, headroom)
        plan = self._plan
        settings = {
            "recipes": {kind: ABOUT[kind] for kind in plan.recipes}, "blocks": self._blocks, "alphas": plan.alphas,
            "score": plan.score, "scope": SCOPE,
        }  # fmt: skip
        facts = {**self._facts, **settings, "machine": machine(), "command": self._command}
        return SearchOutcome(facts=facts, tries=tries, results=results)

    def _require_headroom(self, headroom: Mapping[str, Sequence[str]]) -> None:
        without = [f"{name}: {'; '.join(reasons)}" for name, reasons in headroom.items() if reasons]
        if without and not self._plan.anyway:
            raise EvaluationError(
                f"{len(without)} task(s) cannot show a gain. {' | '.join(without)}. Leave them out, or add --anyway."
            )

    def _sweep(
        self, journal: Journal, shown: Progress, task: str, name: str, conditions: Sequence[Condition]
    ) -> dict[str, Table]:
        """Tables of conditions. name: of the questions: a split, `neutral`, or a prompt."""
        questions = self._questions[task, name]
        total = len(questions) * len({condition.key for condition in conditions})
        with shown.counting(f"{task}, {name}:", total=total, unit="answers") as advance:
            return sweep(self._scorer, journal, f"{task}/{name}", questions, conditions, advance)

    def _plain(self, journal: Journal, shown: Progress, task: str) -> Quality:
        table = self._sweep(journal, shown, task, "validation", [BASELINE])[BASELINE.key]
        return quality(table, self._classes[task, "validation"])

    def _explore(self, journal: Journal, shown: Progress, task: str) -> tuple[list[Try], _Chosen]:
        """All tries of a task on validation, and the best of them."""
        plan, classes = self._plan, self._classes[task, "validation"]
        vectors = {kind: self._vector(journal, shown, task, kind) for kind in plan.recipes}
        grids = {
            kind: [
                Condition(vector=kind, digest=vector.digest, blocks=blocks, alpha=alpha, scope=SCOPE)
                for blocks, alpha in product(self._blocks, plan.alphas)
                if alpha
            ]
            for kind, vector in vectors.items()
        }
        conditions = [BASELINE, *(condition for grid in grids.values() for condition in grid)]
        tables = self._sweep(journal, shown, task, "validation", conditions)
        before = tables[BASELINE.key]
        tries = []
        best: tuple[tuple[float, float, float], _Chosen] | None = None
        for kind, grid in grids.items():
            for condition in grid:
                table = tables[condition.key]
                measured = quality(table, classes)
                changed = table["accuracy"] - before["accuracy"]
                tries.append(
                    Try(
                        task=task, recipe=kind, blocks=condition.blocks, alpha=condition.alpha, quality=measured,
                        gained=int((changed > 0).sum()), lost=int((changed < 0).sum()),
                    )
                )  # fmt: skip
                score = float(getattr(measured, plan.score))
                rank = (score, float(table["share_correct"].mean()), -abs(condition.alpha))
                if best is None or rank > best[0]:
                    best = rank, _Chosen(kind=kind, vector=vectors[kind], condition=condition)
        assert best is not None, "a plan has at least one strength"
        return tries, best[1]

    def _captured(self, journal: Journal, shown: Progress, task: str, kind: Kind) -> tuple[Side, Side]:
        if (task, kind) in self._sides:
            return self._sides[task, kind]
        derive = self._tasks[task].derive
        table = self._sweep(journal, shown, task, "derive", [BASELINE])[BASELINE.key]
        classes = self._classes[task, "derive"]
        chosen_N = margins(table, classes).argmax(axis=1)
        pairs = prompt_pairs(
            kind, derive, self._encoder, shots=self._plan.shots,
            chosen={item.id: int(k) for item, k in zip(derive, chosen_N, strict=True)},
            gold={item.id: int(k) for item, k in zip(derive, classes.gold_N, strict=True)},
            instruction=self._plan.instruction, seed=self._plan.seed,
        )  # fmt: skip
        with shown.counting(f"{task}, capturing {kind}:", total=len(pairs), unit="pairs") as advance:
            sides = self._sides[task, kind] = capture_sides(self._llm, pairs, advance)
        return sides

    def _vector(
        self, journal: Journal, shown: Progress, task: str, kind: Kind, *, shuffled: bool = False
    ) -> ControlVector:
        """The vector of a recipe; shuffled: with positive and negative swapped in half of its pairs.

        An interrupted run loads the file that it wrote before.
        """
        name = f"{task}-{kind}{'-shuffled' if shuffled else ''}"
        path = self._folder / "vectors" / f"{safe_name(name)}.safetensors"
        if path.exists():
            return self._added(load(path))
        sides = self._captured(journal, shown, task, kind)
        if shuffled:
            sides = with_shuffled_sides(sides, seed=self._plan.seed)
        notes = f"{len(sides[0])} pairs of task {task}. {kind}: {ABOUT[kind]}{', shuffled' if shuffled else ''}."
        vector = vector_of(self._llm, sides, "diffmean", model=self._model, notes=notes)
        path.parent.mkdir(parents=True, exist_ok=True)
        save(vector, path)
        return self._added(vector)

    def _added(self, vector: ControlVector) -> ControlVector:
        self._llm.vectors.add(digest_name(vector), vector)
        return vector

    def _preregister(self, chosen: Mapping[str, _Chosen]) -> None:
        """Write the points before the test items run.

        Raises:
            EvaluationError: other points of this folder were tested before: a second choice would be made with
                knowledge of the test.
        """
        path = self._folder / PREREGISTERED
        points = {
            name: {"recipe": each.kind, "digest": each.vector.digest, **asdict(each.condition)}
            for name, each in chosen.items()
        }
        text = json.dumps({"score": self._plan.score, "points": points}, indent=1) + "\n"
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise EvaluationError(
                f"{path}: other points were tested in this folder. Choose another --out and another --seed, so that "
                "the test items are new."
            )
        write_atomically(path, text.encode())

    def _trials(
        self, journal: Journal, shown: Progress, task: str, chosen: Mapping[str, _Chosen]
    ) -> dict[str, Condition]:
        """Conditions on the test items: the chosen one and its controls, by name."""
        own, plan = chosen[task], self._plan

        def same_place(name: str, vector: ControlVector, sign: float = 1.0) -> Condition:
            return Condition(
                vector=name, digest=self._added(vector).digest, blocks=own.condition.blocks,
                alpha=sign * own.condition.alpha, scope=SCOPE,
            )  # fmt: skip

        trials = {"chosen": own.condition, "flipped": same_place("flipped", own.vector, -1.0)}
        for number in range(plan.random_controls):
            name = f"random {number + 1}"
            trials[name] = same_place(name, random_like(own.vector, seed=plan.seed * 1000 + number))
        others = {"shuffled pairs": self._vector(journal, shown, task, own.kind, shuffled=True)}
        others |= {f"vector of {name}": each.vector for name, each in chosen.items() if name != task}
        for name, vector in others.items():
            trials[name] = same_place(name, as_long_as(own.vector, dict(vector.directions), method=f"control: {name}"))
        return trials

    def _test(
        self,
        journal: Journal,
        shown: Progress,
        chosen: Mapping[str, _Chosen],
        plain: Mapping[str, Quality],
        headroom: Mapping[str, list[str]],
    ) -> list[TaskResult]:
        before: dict[str, Table] = {}
        tables: dict[str, dict[str, Table]] = {}
        conditions: dict[str, dict[str, Condition]] = {}
        neutral: dict[str, dict[str, Table]] = {}
        for task in chosen:
            trials = conditions[task] = self._trials(journal, shown, task, chosen)
            measured = self._sweep(journal, shown, task, "test", [BASELINE, *trials.values()])
            neutral[task] = self._sweep(journal, shown, task, "neutral", list(trials.values()))
            before[task] = measured[BASELINE.key]
            tables[task] = {name: measured[condition.key] for name, condition in trials.items()}
            for prompt in PROMPTS:
                tables[task][prompt] = self._sweep(journal, shown, task, prompt, [BASELINE])[BASELINE.key]
        paired = {
            (task, name): compare(before[task]["accuracy"], table["accuracy"], seed=self._plan.seed)
            for task, own in tables.items()
            for name, table in own.items()
        }
        corrected = holm({f"{task}|{name}": each.p for (task, name), each in paired.items()})
        results = []
        for task, own in chosen.items():
            classes = self._classes[task, "test"]
            tokens = mean_tokens(self._questions[task, "test"])
            trials_of_task = []
            for name, table in tables[task].items():
                condition = conditions[task].get(name, BASELINE)
                is_prompt = name in PROMPTS
                trials_of_task.append(
                    SearchTrial(
                        name=name, blocks=condition.blocks, alpha=condition.alpha,
                        paired=paired[task, name], p_holm=corrected[f"{task}|{name}"],
                        quality=quality(table, classes),
                        auroc_change=auroc_difference(before[task], table, classes, seed=self._plan.seed),
                        neutral_kl=None if is_prompt else float(np.mean(neutral[task][condition.key]["kl"])),
                        extra_tokens=mean_tokens(self._questions[task, name]) - tokens if is_prompt else 0.0,
                    )
                )  # fmt: skip
            results.append(
                TaskResult(
                    task=task, about=self._tasks[task].about, recipe=own.kind, digest=own.vector.digest,
                    blocks=own.condition.blocks, alpha=own.condition.alpha, num_test=len(self._tasks[task].test),
                    plain_validation=plain[task], plain=quality(before[task], classes), headroom=headroom[task],
                    preference=fixed_preference(
                        before[task], tables[task]["chosen"], self._tasks[task].test, classes
                    ).mean().item(),
                    prompt_tokens=tokens, trials=trials_of_task,
                )
            )  # fmt: skip
        return results


PROMPTS = ("few-shot prompt", "instruction prompt")
"""Prompts that could be used instead of a vector."""
