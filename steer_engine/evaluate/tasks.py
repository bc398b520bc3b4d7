"""What a model is asked: generated tasks by name, and a user's own by file."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.generated_tasks import babi15, babi16, ioi
from steer_engine.evaluate.items import SPLITS, Item, Sizes, Task

__all__ = ["TASKS", "Item", "Sizes", "Task", "load_task"]

TASKS: dict[str, Callable[[Sizes, int], Task]] = {"ioi": ioi, "babi15": babi15, "babi16": babi16}


def load_task(name_or_path: str, sizes: Sizes, *, seed: int = 0, shots: int = 0) -> Task:
    """A generated task by name, or one from a JSONL file; `shots` solved examples stand before each prompt.

    Raises:
        EvaluationError: no such task or file, or a bad item, by name or line.
    """
    if name_or_path in TASKS:
        task = TASKS[name_or_path](sizes, seed)
    elif Path(name_or_path).is_file():
        task = load_jsonl(Path(name_or_path), sizes, seed)
    else:
        raise EvaluationError(f"There is no task or file {name_or_path[:256]!r}; tasks are {', '.join(TASKS)}.")
    return task.with_shots(shots)


MAX_ANSWERS = 1024
"""Of one item."""

_KEYS = {"prompt", "answers", "correct", "answer", "split", "id"}
_FORMS = '{"prompt": ..., "answers": [" a", " b"], "correct": 0} or {"prompt": ..., "answer": " text"}'


def load_jsonl(path: Path, sizes: Sizes, seed: int) -> Task:
    """Read a task from a file: `prompt` with `answers` and `correct` (its number, from 0), or with one `answer` that
    the model's own text must begin with.

    A file whose lines name their `split` ("derive", "validation", "test") is split so, and must name it everywhere;
    any other file is shuffled by `seed` and cut in the proportions of `sizes`.

    Raises:
        EvaluationError: names file and line.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"{path}: cannot be read ({error}).") from None
    parsed = [_item(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if len(parsed) < 3 * 2:
        raise EvaluationError(f"{path}: {len(parsed)} item(s); at least 2 for each of {', '.join(SPLITS)} are needed.")
    named = [split for _, split in parsed if split]
    if named and len(named) < len(parsed):
        where = next(item.where for item, split in parsed if not split)
        raise EvaluationError(f"{where}: no 'split', but other lines name theirs; name it in all lines or in none.")
    items = [item for item, _ in parsed]
    splits = (
        {name: tuple(item for item, split in parsed if split == name) for name in SPLITS}
        if named
        else _cut(items, sizes, seed)
    )
    for name in SPLITS:
        if len(splits[name]) < 2:
            raise EvaluationError(f"{path}: {len(splits[name])} item(s) of split {name!r}; at least 2 are needed.")
    return Task(name=path.stem, about=str(path.name), **splits)


def _cut(items: list[Item], sizes: Sizes, seed: int) -> dict[str, tuple[Item, ...]]:
    """Shuffled, and cut by `sizes` or, where there are too few items, in their proportions."""
    shuffled = list(items)
    Random(f"jsonl {seed}").shuffle(shuffled)
    share = min(1.0, len(shuffled) / sizes.total)
    num_derive, num_validation = max(2, int(sizes.derive * share)), max(2, int(sizes.validation * share))
    num_test = sizes.test if share == 1.0 else len(shuffled)
    first, second = num_derive, num_derive + num_validation
    return {
        "derive": tuple(shuffled[:first]),
        "validation": tuple(shuffled[first:second]),
        "test": tuple(shuffled[second : second + num_test]),
    }


def _item(line: str, where: str) -> tuple[Item, str]:
    try:
        entry: Any = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise EvaluationError(f"{where}: not JSON ({error}).") from None
    if not isinstance(entry, dict) or not isinstance(entry.get("prompt"), str):
        raise EvaluationError(f"{where}: not an object with a text 'prompt'; valid is {_FORMS}.")
    if unknown := entry.keys() - _KEYS:
        raise EvaluationError(
            f"{where}: unknown key {sorted(unknown)[0][:64]!r}; known are {', '.join(sorted(_KEYS))}."
        )
    if ("answer" in entry) == ("answers" in entry) or ("correct" in entry) != ("answers" in entry):
        raise EvaluationError(f"{where}: valid is {_FORMS}.")
    answers = [entry["answer"]] if "answer" in entry else entry["answers"]
    correct = entry.get("correct", 0)
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise EvaluationError(f"{where}: answers must be texts.")
    if "answers" in entry and not 2 <= len(answers) <= MAX_ANSWERS:
        raise EvaluationError(f"{where}: {len(answers)} answers; valid are 2 to {MAX_ANSWERS}.")
    if isinstance(correct, bool) or not isinstance(correct, int):
        raise EvaluationError(f"{where}: 'correct' is not a number.")
    split = entry.get("split", "")
    if split not in ("", *SPLITS):
        raise EvaluationError(f"{where}: split {str(split)[:64]!r} is none of {', '.join(SPLITS)}.")
    name = str(entry.get("id", where))
    return Item(id=name, prompt=entry["prompt"], answers=tuple(answers), correct=correct, where=where), split
