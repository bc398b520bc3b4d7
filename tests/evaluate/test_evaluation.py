"""Complete evaluations on a real engine: the files, the choice, the controls, and resuming an interrupted run."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_engine import LLM, ControlVector
from steer_engine.errors import EvaluationError, ModelMismatchError
from steer_engine.evaluate.conditions import contrasts, random_like, with_shuffled_labels
from steer_engine.evaluate.evaluation import Evaluation, run_paper
from steer_engine.evaluate.outcome import Outcome, calibrated
from steer_engine.evaluate.plan import Plan, Recipe
from steer_engine.evaluate.report import PAPER_HEADS, paper_markdown, write_results
from steer_engine.evaluate.scorer import Scorer
from steer_engine.evaluate.tasks import Item, Sizes, Task, load_task

ALPHAS = (-1.0, 0.0, 1.0)


@pytest.fixture(scope="module")
def task() -> Task:
    return load_task("ioi", Sizes(derive=8, validation=8, test=12))


@pytest.fixture(scope="module")
def evaluate(tiny_engine: LLM, task: Task) -> Callable[..., Outcome]:
    def run(folder: Path, **plan: Any) -> Outcome:
        settings = {"recipes": (Recipe(method="diffmean"),), "blocks": ("1", "0-2"), "alphas": ALPHAS, **plan}
        return Evaluation(tiny_engine, task, Plan(**settings), folder, model="tiny", progress=False).run()

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def outcome(evaluate: Callable[..., Outcome], folder: Path) -> Outcome:
    pytest.importorskip("matplotlib")
    found = evaluate(folder)
    write_results(found, folder)
    return found


def test_the_grid_the_controls_and_the_choice(outcome: Outcome) -> None:
    validation = [(p.blocks, p.alpha) for p in outcome.points if p.split == "validation"]
    assert validation == [("", 0.0), ("1", -1.0), ("1", 1.0), ("0-2", -1.0), ("0-2", 1.0)]
    (verdict,) = outcome.verdicts
    assert [trial.name for trial in verdict.trials] == ["chosen", "flipped", "random", "shuffled"]
    assert [trial.alpha for trial in verdict.trials] == [
        verdict.alpha, -verdict.alpha, verdict.alpha, verdict.alpha
    ]  # fmt: skip
    best = max(p.metrics["accuracy"].mean for p in outcome.points if p.split == "validation" and p.vector)
    assert verdict.validation == best
    assert all(trial.p_holm >= trial.paired.p for trial in verdict.trials)
    baseline, *steered = (point for point in outcome.points if point.split == "test")
    assert baseline.metrics["kl"].mean == 0.0
    assert all(point.metrics["kl"].mean > 1e-6 for point in steered)
    assert len({point.metrics["kl"].mean for point in steered}) == 4  # four different ways of steering


def test_the_result_files(outcome: Outcome, folder: Path) -> None:
    read = json.loads((folder / "results.json").read_text())
    assert read["facts"]["sizes"] == {"derive": 8, "validation": 8, "test": 12}
    assert read["verdicts"][0]["trials"][0]["paired"]["after"] == outcome.verdicts[0].main.paired.after
    with (folder / "results.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(outcome.points)
    assert float(lines[1]["kl"]) == pytest.approx(outcome.points[1].metrics["kl"].mean, rel=1e-5)


def test_the_report_is_self_contained(outcome: Outcome, folder: Path) -> None:
    page = (folder / "report.html").read_text()
    assert page.count("<svg") == 4
    assert "<script" not in page
    outside = set(re.findall(r'(?:src|href)\s*=\s*"([^"#][^"]*)"', page))
    assert {link.split(",")[0] for link in outside} <= {"data:image/png;base64"}  # the heat map and its colour bar
    for text in ("control: random", "McNemar", outcome.verdicts[0].examples[0].prompt):
        assert text in page


def test_an_interrupted_run_resumes_with_the_same_result(
    outcome: Outcome, evaluate: Callable[..., Outcome], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = (folder / "scores.jsonl").read_bytes().splitlines(keepends=True)
    again = tmp_path / "again"
    (again / "vectors").mkdir(parents=True)
    for vector in (folder / "vectors").iterdir():
        (again / "vectors" / vector.name).write_bytes(vector.read_bytes())
    cut = len(kept) - 30
    (again / "scores.jsonl").write_bytes(b"".join(kept[:cut]) + kept[cut][:20])
    measured = []
    scores = Scorer.scores
    monkeypatch.setattr(Scorer, "scores", lambda self, jobs: measured.extend(jobs) or scores(self, jobs))
    second = evaluate(again)
    assert len(measured) == 30
    assert [v.trials for v in second.verdicts] == [v.trials for v in outcome.verdicts]
    # Numbers from other batches may differ by float32 rounding.
    for one, other in zip(outcome.points, second.points, strict=True):
        assert {n: i.mean for n, i in one.metrics.items()} == pytest.approx(
            {n: i.mean for n, i in other.metrics.items()}, rel=1e-3, abs=1e-4
        )


def test_another_seed_needs_another_folder(evaluate: Callable[..., Outcome], outcome: Outcome, folder: Path) -> None:
    with pytest.raises(EvaluationError, match="another run"):
        evaluate(folder, seed=1)


def test_a_bound_on_kl_excludes_large_strengths(evaluate: Callable[..., Outcome], tmp_path: Path) -> None:
    vector = random_like(ControlVector(directions={1: np.full(64, 1.0, dtype=np.float32)}), seed=3)
    settings = {"recipes": (), "vectors": {"mine": vector}, "blocks": ("1",), "alphas": (0.01, 4.0)}
    found = evaluate(tmp_path / "a", **settings, max_kl=0.01)
    assert found.verdicts[0].alpha == 0.01
    assert found.verdicts[0].main.neutral_kl < 0.01
    strong = next(p for p in found.points if p.split == "neutral" and p.alpha == 4.0)
    assert strong.metrics["kl"].mean > 0.1
    noted = calibrated(vector, found)
    assert noted.digest == vector.digest
    assert noted.metadata.extra["suggested_blocks"] == "1"
    assert noted.metadata.extra["suggested_scale"] == "0.01"
    with pytest.raises(EvaluationError, match="mean KL above 1e-09 on neutral texts"):
        evaluate(tmp_path / "b", **settings, max_kl=1e-9)


def test_invalid_settings_fail_before_measuring(tiny_engine: LLM, task: Task, tmp_path: Path) -> None:
    def start(task: Task = task, **plan: Any) -> None:
        Evaluation(tiny_engine, task, Plan(**plan), tmp_path / "x", model="tiny", progress=False)

    foreign = ControlVector(directions={0: np.ones(8, dtype=np.float32)})
    with pytest.raises(ModelMismatchError, match="hidden size 8"):
        start(vectors={"v": foreign})
    partial = ControlVector(directions={0: np.ones(64, dtype=np.float32)})
    with pytest.raises(EvaluationError, match=r"no direction for block"):
        start(vectors={"v": partial}, blocks=("0-1",))
    with pytest.raises(EvaluationError, match="blocks are 0 to 2"):
        start(recipes=(Recipe(method="diffmean"),), blocks=("3",))
    long = Item(id="l", prompt="x" * 900, answers=(" a", " b"), correct=1, where="mine.jsonl:4")
    with pytest.raises(
        EvaluationError, match=r"mine.jsonl:4: the prompt has 901 tokens|mine.jsonl:4: the prompt has 9"
    ):
        start(
            Task(name="t", derive=task.derive, validation=task.validation, test=(*task.test, long)),
            vectors={"v": partial},
            blocks=("0",),
        )
    assert not (tmp_path / "x").exists()


def test_random_controls_have_the_norms_of_the_vector() -> None:
    vector = ControlVector(directions={b: np.full(64, b + 0.5, dtype=np.float32) for b in range(3)})
    control = random_like(vector, seed=0)
    for block in vector.blocks:
        assert control.norms[block] == pytest.approx(vector.norms[block], rel=1e-6)
        cosine = control.directions[block] @ vector.directions[block] / vector.norms[block] ** 2
        assert abs(cosine) < 5 / 8  # five standard deviations of a random direction in 64 dimensions
    assert control.digest != random_like(vector, seed=1).digest


def test_shuffled_labels_swap_half(task: Task) -> None:
    pairs = contrasts(task.derive, "wrong")
    shuffled = with_shuffled_labels(pairs)
    swapped = [a.positive == b.negative and a.negative == b.positive for a, b in zip(pairs, shuffled, strict=True)]
    same = [a == b for a, b in zip(pairs, shuffled, strict=True)]
    assert (sum(swapped), sum(same)) == (4, 4)


def test_negatives_of_the_paper_are_permuted_prompts(task: Task) -> None:
    for pair, item in zip(contrasts(task.derive, "random"), task.derive, strict=True):
        assert pair.positive == (item.prompt, item.target)
        assert sorted(pair.negative[0]) == sorted(item.prompt[:75])
        assert pair.negative[0] != item.prompt[:75]


def test_both_protocols_run_on_one_task(tiny_engine: LLM, task: Task, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    run = run_paper(tiny_engine, task, tmp_path, alphas=(-0.5, 0.5), seed=0, model="tiny", progress=False)
    text = paper_markdown([run])
    table = [line for line in text.splitlines() if line.startswith("| ioi")]
    assert [line.split(" | ")[1] for line in table] == [
        "Reading", "Contrastive", "PCA contrastive", "ours: diffmean-wrong"
    ]  # fmt: skip
    assert all(line.count(" | ") == len(PAPER_HEADS) - 1 for line in table)
    assert {verdict.blocks for verdict in run.paper.verdicts} == {"1"}
    assert (tmp_path / "paper" / "report.html").is_file()
    assert (tmp_path / "ours" / "report.html").is_file()
