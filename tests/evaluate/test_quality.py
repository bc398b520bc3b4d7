"""Classes of answers, and measures of choice: a bias moves accuracy and not the AUROC."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.items import Item
from steer_engine.evaluate.quality import (
    Classes,
    auroc_difference,
    fixed_preference,
    margins,
    problems,
    quality,
    require_classes,
)
from steer_engine.evaluate.statistics import choice_metrics
from steer_engine.evaluate.sweep import Table

NUM = 400


def item(prompt: str, *answers: str, correct: int = 0) -> Item:
    return Item(id=prompt, prompt=prompt, answers=answers, correct=correct)


def table(score_NK: np.ndarray, items: list[Item]) -> Table:
    """The table of a condition whose answers have these log-probabilities, in the order of each item's answers."""
    rows = [
        {**choice_metrics(score_K, each.correct), **{f"answer_{k}": v for k, v in enumerate(score_K)}, "kl": 0.1}
        | {"entropy": 2.0}
        for score_K, each in zip(score_NK, items, strict=True)
    ]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}


@pytest.fixture
def yes_no() -> list[Item]:
    return [item(f"q{i}", " No", " Yes", correct=i % 2) for i in range(NUM)]


def signal(items: list[Item], strength: float, bias: float, seed: int = 0) -> np.ndarray:
    """Log-probabilities with noise of 1, the right answer higher by `strength`, the first answer by `bias`."""
    score_NK = np.random.default_rng(seed).normal(-3.0, 1.0, (len(items), 2))
    score_NK[np.arange(len(items)), [each.correct for each in items]] += strength
    score_NK[:, 0] += bias
    return score_NK


def test_classes_of_one_set_of_answers_are_the_answers(yes_no: list[Item]) -> None:
    classes = require_classes("t", yes_no)
    assert classes.names == ("No", "Yes")
    assert classes.gold_N.tolist() == [0, 1] * (NUM // 2)
    assert classes.shares == {"No": 0.5, "Yes": 0.5}


def test_classes_of_different_answers_follow_the_prompt() -> None:
    items = [
        item("Anna has a box, Ann has a bag. Who has a bag?", " Ann", " Anna", correct=0),
        item("Mary and John, John", " John", " Mary", correct=1),
        item("Mary said it", " Zoe", " Mary", correct=0),  # not mentioned: last
    ]
    classes = require_classes("t", items)
    assert classes.order_NK.tolist() == [[1, 0], [1, 0], [1, 0]]
    assert classes.gold_N.tolist() == [1, 0, 1]


def test_items_without_a_common_number_of_answers_are_refused() -> None:
    for items in ([item("a", " x"), item("b", " y")], [item("a", " x", " y"), item("b", " x", " y", " z")]):
        with pytest.raises(EvaluationError, match="Task mine: a search needs items with several answers"):
            require_classes("mine", items)


def test_a_bias_moves_accuracy_and_not_the_auroc(yes_no: list[Item]) -> None:
    classes = require_classes("t", yes_no)
    fair, biased = (quality(table(signal(yes_no, 1.0, bias), yes_no), classes) for bias in (0.0, 3.0))
    assert biased.chosen["No"] > 0.9
    assert fair.accuracy - biased.accuracy > 0.1
    assert biased.auroc == pytest.approx(fair.auroc, abs=1e-12)
    assert biased.d_prime == pytest.approx(fair.d_prime, abs=1e-9)
    assert biased.by_class["No"] > biased.by_class["Yes"]
    assert biased.balanced == pytest.approx((biased.by_class["No"] + biased.by_class["Yes"]) / 2)


def test_more_signal_raises_the_auroc(yes_no: list[Item]) -> None:
    classes = require_classes("t", yes_no)
    before, after = (table(signal(yes_no, strength, 0.0), yes_no) for strength in (0.5, 1.5))
    change = auroc_difference(before, after, classes)
    assert change.low > 0.0
    assert change.low < change.mean < change.high
    # The AUROC of a difference of two normals with a gap of 2 s and a deviation of sqrt(2).
    expected = 0.5 * (1 + math.erf(1.5 / math.sqrt(2)))
    assert quality(after, classes).auroc == pytest.approx(expected, abs=0.05)
    same = auroc_difference(before, before, classes)
    assert (same.mean, same.low, same.high) == (0.0, 0.0, 0.0)


def test_margins_follow_the_classes_and_not_the_order_of_the_answers() -> None:
    items = [item("b then a", " a", " b", correct=1), item("c then d", " c", " d", correct=0)]
    classes = require_classes("t", items)
    found = margins(table(np.array([[-1.0, -3.0], [-2.0, -5.0]]), items), classes)
    assert found.tolist() == [[-2.0, 2.0], [3.0, -3.0]]


def test_a_fixed_preference_is_told_from_a_better_choice() -> None:
    """Numbers: preferring large ones explains "the largest"; knowing which place is asked for is not a preference."""
    random = np.random.default_rng(1)
    words = [f"w{i}" for i in range(12)]
    largest, asked = [], []
    for number in range(NUM):
        places = random.permutation(12)[:3]
        prompt = f"{number} " + " ".join(words[i] for i in places)
        answers = tuple(f" {words[i]}" for i in places)
        largest.append(item(prompt, *answers, correct=int(places.argmax())))
        asked.append(item(f"{prompt} ?", *answers, correct=int(random.integers(3))))
    for items, expected in ((largest, 1.0), (asked, 1 / 3)):
        classes = require_classes("t", items)
        plain_NK = random.normal(-3.0, 0.1, (NUM, 3))
        steered_NK = plain_NK.copy()
        if items is largest:
            steered_NK += [[words.index(answer.strip()) for answer in each.answers] for each in items]
        else:
            steered_NK[np.arange(NUM), [each.correct for each in items]] += 5.0
        before, after = table(plain_NK, items), table(steered_NK, items)
        assert quality(after, classes).accuracy == 1.0
        # Four standard deviations of a guess.
        assert fixed_preference(before, after, items, classes).mean() == pytest.approx(expected, abs=0.1)


def test_one_gold_class_has_no_auroc() -> None:
    items = [item(f"x{i} y{i}", f" x{i}", f" y{i}") for i in range(10)]
    classes = Classes.of(items)
    assert classes is not None
    found = quality(table(np.random.default_rng(0).normal(-2, 1, (10, 2)), items), classes)
    assert math.isnan(found.auroc)
    assert math.isnan(found.d_prime)


@pytest.mark.parametrize(
    ("strength", "bias", "shift", "reason"),
    [
        (9.0, 0.0, 0.0, "at the ceiling"),
        (0.0, 0.0, 0.0, "at chance"),
        (1.0, 0.0, -4.0, r"answers hold \d\.\d % of the probability"),
    ],
)
def test_a_task_without_headroom_is_named(
    yes_no: list[Item], strength: float, bias: float, shift: float, reason: str
) -> None:
    classes = require_classes("t", yes_no)
    (found,) = problems(quality(table(signal(yes_no, strength, bias) + shift, yes_no), classes), classes)
    assert re.search(reason, found)


def test_unbalanced_gold_answers_are_named() -> None:
    items = [item(f"q{i}", " No", " Yes", correct=int(i % 4 == 0)) for i in range(NUM)]
    classes = require_classes("t", items)
    (found,) = problems(quality(table(signal(items, 1.0, 0.0), items), classes), classes)
    assert found == "the right answers are out of balance (No 75 %, Yes 25 %)"


def test_a_task_with_headroom_has_no_problem(yes_no: list[Item]) -> None:
    classes = require_classes("t", yes_no)
    assert problems(quality(table(signal(yes_no, 1.0, 0.0), yes_no), classes), classes) == []
