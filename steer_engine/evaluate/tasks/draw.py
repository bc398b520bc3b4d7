"""Drawing distinct items for the three splits."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from random import Random

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.tasks.item import SPLITS, Item, Sizes, Task

Make = Callable[[Random, str], tuple[Hashable, str, list[str], str]]
"""From a source of chance and a split's name: what identifies the item, prompt, answers, the right one."""

MAX_TRIES = 100
"""Per item, before a space of items counts as used up."""


def draw(name: str, make: Make, sizes: Sizes, seed: int, about: str) -> Task:
    """A task of distinct items; the same seed and sizes give the same task on every machine.

    Raises:
        EvaluationError: there are not that many distinct items.
    """
    seen: set[Hashable] = set()
    splits: dict[str, tuple[Item, ...]] = {}
    for split in SPLITS:
        random = Random(f"{name} {split} {seed}")  # each split has a stream of its own
        items: list[Item] = []
        for number in range(getattr(sizes, split)):
            for _ in range(MAX_TRIES):
                identity, prompt, answers, right = make(random, split)
                if identity not in seen:
                    break
            else:
                raise EvaluationError(f"Task {name} has no {getattr(sizes, split)} distinct {split} items; ask fewer.")
            seen.add(identity)
            where = f"{name} {split} {number}"
            ordered = sorted(answers)
            item = Item(
                id=f"{split}-{number}", prompt=prompt, answers=tuple(ordered), correct=ordered.index(right), where=where
            )
            items.append(item)
        splits[split] = tuple(items)
    return Task(name=name, about=about, **splits)
