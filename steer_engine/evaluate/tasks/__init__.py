"""What a model is asked: generated tasks by name, and a user's own by file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.tasks.babi15 import babi15
from steer_engine.evaluate.tasks.babi16 import babi16
from steer_engine.evaluate.tasks.ioi import ioi
from steer_engine.evaluate.tasks.item import Item, Sizes, Task
from steer_engine.evaluate.tasks.jsonl import load_jsonl

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
