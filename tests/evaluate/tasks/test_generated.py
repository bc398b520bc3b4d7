"""Generated tasks: answers follow their rules, a seed reproduces the task, and splits are disjoint."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.tasks import NAMES, OBJECTS, PAPER_TASKS, PLACES, PLURALS, Item, Sizes, Task, load_task

SIZES = Sizes(derive=100, validation=100, test=500)


@pytest.fixture(scope="module", params=PAPER_TASKS)
def task(request: pytest.FixtureRequest) -> Task:
    return load_task(request.param, SIZES, seed=3)


def solve_ioi(item: Item) -> str:
    names = re.findall(r"\b[A-Z][a-z]+\b", item.prompt)[1:]  # the first word opens the sentence
    assert len(names) == 3
    (once,) = [name for name, count in Counter(names).items() if count == 1]
    assert names[2] != once
    return f" {once}"


def solve_babi15(item: Item) -> str:
    singular = {plural: species for species, plural in PLURALS.items()}
    fears = dict(re.findall(r"(\w+) are afraid of (\w+)\.", item.prompt))
    species_of = dict(re.findall(r"([A-Z]\w+) is a (\w+)\.", item.prompt))
    (subject,) = re.findall(r"What is (\w+) afraid of\?", item.prompt)
    assert (len(fears), len(species_of)) == (4, 4)
    return f" {singular[fears[PLURALS[species_of[subject.capitalize()]].capitalize()]]}"


def solve_babi16(item: Item) -> str:
    species_of = dict(re.findall(r"([A-Z]\w+) is a (\w+)\.", item.prompt))
    colour_of = dict(re.findall(r"([A-Z]\w+) is (gray|white|yellow|green)\.", item.prompt))
    (subject,) = re.findall(r"What color is (\w+)\?", item.prompt)
    subject = subject.capitalize()
    assert (len(species_of), len(colour_of)) == (5, 4)
    assert subject not in colour_of
    others = [name for name in species_of if name != subject]
    kin = {colour_of[name] for name in others if species_of[name] == species_of[subject]}
    assert len(kin) == 1  # no contradiction
    return f" {kin.pop()}"


SOLVERS = {"ioi": solve_ioi, "babi15": solve_babi15, "babi16": solve_babi16}


def test_every_answer_follows_from_its_prompt(task: Task) -> None:
    assert [item.target for item in task.items] == [SOLVERS[task.name](item) for item in task.items]


def test_sizes_and_distinct_items(task: Task) -> None:
    assert [len(split) for split in (task.derive, task.validation, task.test)] == [100, 100, 500]
    assert len({item.prompt for item in task.items}) == SIZES.total


def test_answers_are_balanced(task: Task) -> None:
    places = Counter(item.correct for item in task.items)
    fair = SIZES.total / len(task.items[0].answers)
    # Six standard deviations of a fair draw.
    assert all(abs(count - fair) < 6 * fair**0.5 for count in places.values()), places


def test_a_seed_reproduces_the_task() -> None:
    for name in PAPER_TASKS:
        assert load_task(name, SIZES, seed=3).digest == load_task(name, SIZES, seed=3).digest
        assert load_task(name, SIZES, seed=3).digest != load_task(name, SIZES, seed=4).digest


def test_ioi_splits_share_no_name() -> None:
    sets = list(map(set, NAMES.values()))
    assert not sets[0] & sets[1] | sets[0] & sets[2] | sets[1] & sets[2]
    assert all(len(names) >= 33 for names in sets)
    made = load_task("ioi", SIZES)
    for split, names in NAMES.items():
        assert {answer.strip() for item in getattr(made, split) for answer in item.answers} <= set(names)


def test_ioi_has_both_orders_and_lengths_and_all_words() -> None:
    made = load_task("ioi", SIZES)
    orders = Counter()
    for item in made.items:
        first = re.findall(r"\b[A-Z][a-z]+\b", item.prompt)[1]
        orders[f" {first}" == item.target, "long conversation" in item.prompt] += 1
    assert min(orders.values()) > SIZES.total / 8, orders
    text = " ".join(item.prompt for item in made.items)
    assert all(word in text for word in (*PLACES, *OBJECTS))


def test_babi15_items_differ_in_more_than_order() -> None:
    made = load_task("babi15", SIZES)
    sorted_sentences = {"".join(sorted(re.split(r"(?<=\.) ", item.prompt.replace("\n", ". ")))) for item in made.items}
    assert len(sorted_sentences) == SIZES.total


def test_too_few_distinct_items_is_an_error() -> None:
    from random import Random

    from steer_engine.evaluate.tasks import draw

    def coin(random: Random, split: str) -> tuple[int, str, list[str], str]:
        side = random.randrange(5)
        return side, f"q{side}", [" a", " b"], " ab"[0] + "ab"[side % 2]

    with pytest.raises(EvaluationError, match="has fewer than 2 distinct test items"):
        draw("coin", coin, Sizes(derive=2, validation=2, test=2), 0, "")


def test_unknown_task() -> None:
    with pytest.raises(EvaluationError, match="There is no task or file 'ioj'; tasks are ioi, babi15, babi16"):
        load_task("ioj", SIZES)
