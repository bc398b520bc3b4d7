"""Tasks from JSONL files: splits, kinds, and errors that name the line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.tasks import Sizes, load_task

SIZES = Sizes(derive=4, validation=4, test=8)


def choice(number: int, **fields: Any) -> dict[str, Any]:
    return {"prompt": f"q{number}", "answers": [" yes", " no"], "correct": number % 2, **fields}


def write(path: Path, entries: list[Any]) -> str:
    path.write_text("\n".join(entry if isinstance(entry, str) else json.dumps(entry) for entry in entries))
    return str(path)


def test_a_file_without_splits_is_shuffled_and_divided(tmp_path: Path) -> None:
    name = write(tmp_path / "mine.jsonl", [choice(i) for i in range(20)])
    task = load_task(name, SIZES, seed=1)
    assert task.name == "mine"
    assert [len(split) for split in (task.derive, task.validation, task.test)] == [4, 4, 8]
    assert task.digest == load_task(name, SIZES, seed=1).digest != load_task(name, SIZES, seed=2).digest


def test_a_small_file_is_divided_in_proportion(tmp_path: Path) -> None:
    task = load_task(write(tmp_path / "a.jsonl", [choice(i) for i in range(8)]), SIZES)
    assert [len(split) for split in (task.derive, task.validation, task.test)] == [2, 2, 4]


def test_named_splits_are_kept(tmp_path: Path) -> None:
    names = ["derive", "validation", "test"] * 2
    name = write(tmp_path / "a.jsonl", [choice(i, split=split) for i, split in enumerate(names)])
    task = load_task(name, SIZES)
    assert [item.prompt for item in task.test] == ["q2", "q5"]


def test_one_answer_is_an_exact_match(tmp_path: Path) -> None:
    entries = [{"prompt": f"q{i}", "answer": f" {i}", "id": f"n{i}"} for i in range(9)]
    task = load_task(write(tmp_path / "a.jsonl", entries), SIZES)
    assert task.kind == "exact"
    assert {item.id for item in task.items} == {f"n{i}" for i in range(9)}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ([1], "not an object"),
        ({"prompt": 1}, "string 'prompt'"),
        (choice(0, colour="red"), "unknown key 'colour'"),
        ({"prompt": "q"}, "valid is"),
        ({"prompt": "q", "answers": [" a", " b"]}, "valid is"),
        ({"prompt": "q", "answer": " a", "correct": 0}, "valid is"),
        (choice(0, answers=[" a"]), "valid are 2 to"),
        (choice(0, answers=[" a", 1]), "must be strings"),
        (choice(0, correct=2), "must be 0 to 1"),
        (choice(0, correct=True), "not a number"),
        (choice(0, answers=[" a", " a"]), "twice"),
        (choice(0, split="train"), "none of derive, validation, test"),
        (choice(0, prompt="q1"), "repeats"),
    ],
)
def test_invalid_lines_are_named(line: Any, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    entries: list[Any] = [choice(i) for i in range(1, 9)]
    write(path, [*entries[:3], line, *entries[3:]])
    with pytest.raises(EvaluationError, match=message) as caught:
        load_task(str(path), SIZES)
    assert "a.jsonl:" in caught.value.message


def test_splits_are_named_in_all_lines_or_none(tmp_path: Path) -> None:
    name = write(tmp_path / "a.jsonl", [choice(0, split="test"), *(choice(i) for i in range(1, 9))])
    with pytest.raises(EvaluationError, match=r"a.jsonl:2: no 'split'"):
        load_task(name, SIZES)
    short = write(tmp_path / "b.jsonl", [choice(i, split="test") for i in range(9)])
    with pytest.raises(EvaluationError, match="0 item.s. of split 'derive'"):
        load_task(short, SIZES)
    with pytest.raises(EvaluationError, match="at least 2 for each"):
        load_task(write(tmp_path / "c.jsonl", [choice(0)]), SIZES)
