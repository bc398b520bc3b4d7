"""Pairs of texts made from a task's items, to derive a vector from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Literal

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.tasks.item import Item

Against = Literal["wrong", "random"]

SCRAMBLED_CHARS = 75
"""Of the prompt, permuted: the paper's negatives."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """Two texts, each a prompt and the beginning of an answer."""

    positive: tuple[str, str]
    negative: tuple[str, str]


def contrasts(items: Sequence[Item], against: Against, *, seed: int = 0) -> list[Contrast]:
    """A contrast per item. Positive: the prompt with its right answer. Negative: `"wrong"`, the prompt with one of its
    wrong answers; `"random"`, a permutation of the prompt's first characters, as in Højer et al. (2025).

    Raises:
        EvaluationError: items of an exact match have no wrong answer.
    """
    random = Random(f"contrasts {seed}")
    made = []
    for item in items:
        if against == "random":
            letters = list(item.prompt[:SCRAMBLED_CHARS])
            random.shuffle(letters)
            negative = ("".join(letters), "")
        elif item.wrong:
            negative = (item.prompt, random.choice(item.wrong))
        else:
            raise EvaluationError(
                f"{item.where or item.id}: no wrong answer to contrast with; use --against random, or --vector."
            )
        made.append(Contrast(positive=(item.prompt, item.target), negative=negative))
    return made


def with_shuffled_labels(pairs: Sequence[Contrast], *, seed: int = 0) -> list[Contrast]:
    """The same pairs, in a random half of which positive and negative have changed places."""
    swapped = set(Random(f"shuffled labels {seed}").sample(range(len(pairs)), len(pairs) // 2))
    return [
        replace(pair, positive=pair.negative, negative=pair.positive) if number in swapped else pair
        for number, pair in enumerate(pairs)
    ]
