"""Checks of items, tasks and sizes; few-shot prompts."""

from __future__ import annotations

from typing import Any

import pytest

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.tasks import Item, Sizes, Task


def item(number: int, **fields: Any) -> Item:
    return Item(**{"id": str(number), "prompt": f"q{number}", "answers": (" a", " b"), "correct": number % 2, **fields})


def task(**fields: Any) -> Task:
    splits = {"derive": (item(0), item(1)), "validation": (item(2), item(3)), "test": (item(4), item(5))}
    return Task(**{"name": "t", **splits, **fields})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": " "}, "empty"),
        ({"answers": ()}, "missing"),
        ({"answers": (" a", " ")}, "missing or empty"),
        ({"answers": (" a", " a")}, "twice"),
        ({"correct": 2}, "must be 0 to 1"),
        ({"correct": -1}, "must be 0 to 1"),
    ],
)
def test_invalid_items_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(EvaluationError, match=message) as caught:
        item(0, where="file.jsonl:7", **fields)
    assert caught.value.message.startswith("file.jsonl:7")


def test_target_and_wrong_answers() -> None:
    made = item(1, answers=(" a", " b", " c"))
    assert (made.target, made.wrong) == (" b", (" a", " c"))


def test_a_task_with_a_constant_answer_is_refused() -> None:
    with pytest.raises(EvaluationError, match="right answer is ' a' in every item"):
        task(**{split: (item(i, correct=0), item(i + 1, correct=0))
                for split, i in (("derive", 0), ("validation", 2), ("test", 4))})  # fmt: skip


def test_an_item_in_two_splits_is_refused() -> None:
    with pytest.raises(EvaluationError, match="4 repeats 0"):
        task(test=(item(4, prompt="q0"), item(5)))


def test_kinds_do_not_mix() -> None:
    with pytest.raises(EvaluationError, match="use one kind"):
        task(test=(item(4, answers=(" a",), correct=0), item(5)))
    assert task().kind == "choice"


def test_digest_follows_content_and_split() -> None:
    assert task().digest == task(name="other").digest
    assert task().digest != task(derive=(item(0), item(7))).digest
    assert task().digest != task(derive=(item(2), item(3)), validation=(item(0), item(1))).digest


def test_shots_are_removed_from_the_derive_split() -> None:
    derive = tuple(item(10 + i) for i in range(4))
    shown = task(derive=derive).with_shots(2)
    assert shown.test[0].prompt == "q10 a\n\nq11 b\n\nq4"
    assert [each.id for each in shown.derive] == ["12", "13"]
    assert shown.derive[0].prompt.endswith("\n\nq12")
    with pytest.raises(EvaluationError, match="leave too few"):
        task().with_shots(1)


def test_sizes() -> None:
    assert Sizes(derive=2, validation=3, test=4).total == 9
    with pytest.raises(EvaluationError, match="test: 1 item"):
        Sizes(test=1)
