"""A search on a real engine: all tries, the pre-registered point, controls, prompts; resuming, and errors before it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from steer_engine import LLM
from steer_engine.errors import EvaluationError
from steer_engine.evaluate.prompt_vectors import KINDS, prompt_pairs, shots_of, split_pool, with_shuffled_sides
from steer_engine.evaluate.report import write_search
from steer_engine.evaluate.scorer import Scorer
from steer_engine.evaluate.search import PREREGISTERED, PROMPTS, Search, SearchPlan
from steer_engine.evaluate.search_outcome import SearchOutcome, sentence
from steer_engine.evaluate.statistics import Interval
from steer_engine.evaluate.tasks import Item, Sizes, Task, load_task

SIZES = Sizes(derive=24, validation=12, test=16)
PLAN = SearchPlan(
    recipes=("shots", "labels", "answer"), blocks=("0", "1"), alphas=(0.0, 2.0), shots=3, random_controls=2, anyway=True
)


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    return [load_task(name, SIZES) for name in ("order-yes-no", "compare")]


@pytest.fixture(scope="module")
def search(tiny_engine: LLM, tasks: list[Task]) -> Callable[..., SearchOutcome]:
    def run(folder: Path, **plan: Any) -> SearchOutcome:
        return Search(tiny_engine, tasks, replace(PLAN, **plan), folder, model="tiny", progress=False).run()

    return run


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("search")


@pytest.fixture(scope="module")
def outcome(search: Callable[..., SearchOutcome], folder: Path) -> SearchOutcome:
    pytest.importorskip("matplotlib")
    found = search(folder)
    write_search(found, folder)
    return found


def test_every_point_of_the_grid_is_a_try_and_the_best_is_tested(outcome: SearchOutcome) -> None:
    points = [(each.task, each.recipe, each.blocks, each.alpha) for each in outcome.tries]
    assert points == [(t, r, b, 2.0) for t in ("order-yes-no", "compare") for r in PLAN.recipes for b in ("0", "1")]
    for result in outcome.results:
        own = [each for each in outcome.tries if each.task == result.task]
        chosen = next(each for each in own if (each.recipe, each.blocks) == (result.recipe, result.blocks))
        assert chosen.quality.accuracy == max(each.quality.accuracy for each in own)
        assert result.alpha == result.main.alpha == 2.0
        assert result.num_test == 16


def test_controls_and_prompts_stand_beside_the_chosen_point(outcome: SearchOutcome) -> None:
    first, second = outcome.results
    names = ["chosen", "flipped", "random 1", "random 2", "shuffled pairs"]
    assert [trial.name for trial in first.trials] == [*names, "vector of compare", *PROMPTS]
    assert [trial.name for trial in second.trials] == [*names, "vector of order-yes-no", *PROMPTS]
    for trial in first.trials:
        assert trial.is_prompt == (trial.extra_tokens > 0.0)
        assert trial.p_holm >= trial.paired.p
    steered = [trial.quality.kl for trial in first.trials if not trial.is_prompt]
    assert len(set(steered)) == 6  # six different ways of steering
    assert min(steered) > 1e-6


def test_the_files_list_every_try_and_the_numbers(outcome: SearchOutcome, folder: Path) -> None:
    with (folder / "tries.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(outcome.tries)
    read = json.loads((folder / "search.json").read_text())
    assert read["results"][0]["trials"][0]["paired"]["after"] == outcome.results[0].main.paired.after
    registered = json.loads((folder / PREREGISTERED).read_text())["points"]
    assert {name: point["digest"] for name, point in registered.items()} == {
        each.task: each.digest for each in outcome.results
    }
    page = (folder / "search.md").read_text()
    for text in ("## order-yes-no", "few-shot prompt", "change of AUROC", sentence(outcome.results[0])):
        assert text in page
    assert (folder / "order-yes-no.svg").read_text().startswith("<svg")


def test_a_second_run_measures_nothing_and_finds_the_same(
    search: Callable[..., SearchOutcome], outcome: SearchOutcome, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measured = []
    scores = Scorer.scores
    monkeypatch.setattr(Scorer, "scores", lambda self, jobs: measured.extend(jobs) or scores(self, jobs))
    again = search(folder)
    assert not measured
    assert again.to_csv() == outcome.to_csv()
    assert [each.trials for each in again.results] == [each.trials for each in outcome.results]


def test_another_point_is_refused_once_the_test_items_were_used(
    search: Callable[..., SearchOutcome], outcome: SearchOutcome, folder: Path
) -> None:
    other = "1" if outcome.results[0].blocks == "0" else "0"
    with pytest.raises(EvaluationError, match=r"preregistered.json: other points were tested in this folder"):
        search(folder, blocks=(other,))


def test_a_task_without_headroom_is_named_before_the_search(
    search: Callable[..., SearchOutcome], tmp_path: Path
) -> None:
    with pytest.raises(EvaluationError, match=r"cannot show a gain\. .*answers hold .* or add --anyway"):
        search(tmp_path, anyway=False)
    assert not (tmp_path / "vectors").exists()


def test_settings_that_do_not_fit_fail_before_measuring(tiny_engine: LLM, tasks: list[Task], tmp_path: Path) -> None:
    def start(tasks: list[Task] = tasks, **plan: Any) -> None:
        Search(tiny_engine, tasks, replace(PLAN, **plan), tmp_path / "x", model="tiny", progress=False)

    with pytest.raises(EvaluationError, match="blocks are 0 to 2"):
        start(blocks=("3",))
    with pytest.raises(EvaluationError, match="A task is given twice: compare, compare"):
        start([tasks[1], tasks[1]])
    with pytest.raises(EvaluationError, match=r"24 derive items are too few for 13 examples"):
        start(shots=13)
    with pytest.raises(EvaluationError, match="All strengths are 0"):
        start(alphas=(0.0,))
    with pytest.raises(EvaluationError, match="Give each recipe once"):
        start(recipes=("shots", "shots"))
    assert not (tmp_path / "x").exists()


class Letters:
    """A tokenizer of letters."""

    def encode(self, text: str, **_: Any) -> list[int]:
        return [ord(letter) for letter in text]


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompts_of_a_recipe(kind: str, tasks: list[Task]) -> None:
    from steer_engine.evaluate.encode import Encoder

    items = tasks[0].derive
    ids = {item.id: number % 2 for number, item in enumerate(items)}
    pairs = prompt_pairs(
        kind, items, Encoder(Letters(), max_tokens=4000), shots=3, chosen=ids, gold=dict.fromkeys(ids, 0),
        instruction="Do it.\n",
    )  # fmt: skip
    texts = [("".join(map(chr, one)), "".join(map(chr, other))) for one, other in pairs]
    prompts = {item.prompt: item for item in items}
    examples, queries = split_pool(items, 3)
    assert (len(examples), len(queries)) == (4, 12)
    if kind in ("shots", "labels", "format"):
        assert len(texts) == len(queries)
        solved, plain = {shots_of(each) for each in examples}, {item.prompt + " " for item in queries}
        for one, other in texts:
            assert any(one.startswith(each) for each in solved) == (kind != "format")
            assert (other in plain) == (kind != "labels")
            assert one.count("Question:") == 4
        # The query itself is never among its examples.
        assert not {item.prompt for each in examples for item in each} & {item.prompt for item in queries}
    elif kind == "instruction":
        assert texts == [(f"Do it.\n{item.prompt} ", f"{item.prompt} ") for item in items]
    elif kind == "answer":
        for one, _ in texts:
            prompt, answer = one[: one.index("Answer:") + 7], one[one.index("Answer:") + 7 :]
            assert prompts[prompt].target == answer
        assert all(one != other for one, other in texts)
    else:  # chosen class 0 is right, and the favourite
        right = {item.prompt + " " for item in items if ids[item.id] == 0}
        assert len(texts) == 12
        assert all((one in right) == (kind == "correct") for one, _ in texts)
        assert all((other in right) == (kind == "bias") for _, other in texts)


def test_own_answers_that_never_differ_are_an_error(tasks: list[Task]) -> None:
    from steer_engine.evaluate.encode import Encoder

    same = {item.id: 0 for item in tasks[0].derive}
    with pytest.raises(EvaluationError, match="The model answers correctly in 24 of 24 derive items"):
        prompt_pairs("correct", tasks[0].derive, Encoder(Letters(), max_tokens=4000), shots=3, chosen=same, gold=same)


def test_shuffled_sides_swap_half_of_the_pairs() -> None:
    one, other = [object() for _ in range(10)], [object() for _ in range(10)]
    swapped = with_shuffled_sides((one, other))  # type: ignore[arg-type]
    assert sum(a is b for a, b in zip(swapped[0], other, strict=True)) == 5
    assert all({a, b} == {c, d} for a, b, c, d in zip(*swapped, one, other, strict=True))  # type: ignore[misc]


def test_a_gain_must_be_large_significant_and_above_its_controls(outcome: SearchOutcome) -> None:
    result = outcome.results[0]

    def trial(name: str, low: float, high: float, p: float, auroc: tuple[float, float]) -> Any:
        template = next(each for each in result.trials if each.name == name)
        difference = Interval(mean=(low + high) / 2, low=low, high=high)
        change = Interval(mean=sum(auroc) / 2, low=auroc[0], high=auroc[1])
        return replace(template, paired=replace(template.paired, difference=difference), p_holm=p, auroc_change=change)

    main = trial("chosen", 0.10, 0.20, 1e-9, (0.05, 0.10))
    below = trial("random 1", -0.02, 0.05, 1.0, (0.0, 0.0))
    close = trial("random 1", 0.05, 0.11, 1.0, (0.0, 0.0))
    good = replace(result, trials=[main, below])
    assert good.holds
    assert "AUROC rises" in good.nature
    assert not replace(good, trials=[main, close]).holds
    assert [each.name for each in replace(good, trials=[main, close]).close_controls] == ["random 1"]
    bias = replace(good, trials=[trial("chosen", 0.10, 0.20, 1e-9, (-0.01, 0.02)), below])
    assert "correction of a bias" in bias.nature
    assert not replace(good, trials=[trial("chosen", 0.01, 0.08, 1e-9, (0.05, 0.1)), below]).holds
    doubtful = replace(good, trials=[trial("chosen", 0.10, 0.20, 0.02, (0.05, 0.1)), below])
    assert (doubtful.holds, doubtful.nature) == (False, "no gain")
    undefined = replace(good, trials=[trial("chosen", 0.1, 0.2, 1e-9, (float("nan"),) * 2), below])
    assert "task induction" in undefined.nature


def test_detectable_gain_of_a_known_test(outcome: SearchOutcome) -> None:
    main = outcome.results[0].main
    paired = replace(main.paired, gained=150, lost=50)
    result = replace(outcome.results[0], num_test=1000, trials=[replace(main, paired=paired)])
    assert result.detectable == pytest.approx((2.576 + 0.842) * np.sqrt(0.2 / 1000))


def test_items_that_are_prefixed_keep_their_answers() -> None:
    item = Item(id="i", prompt="p", answers=(" a", " b"), correct=1)
    assert item.after("x ") == Item(id="i", prompt="x p", answers=(" a", " b"), correct=1)
