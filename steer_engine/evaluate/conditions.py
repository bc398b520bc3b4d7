"""Steering conditions, and the vectors that an evaluation makes: contrast pairs from items, and control directions.

A condition is one way of steering that is applied to every item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from random import Random
from typing import Any, Literal

import numpy as np

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.items import Item
from steer_engine.vectors.control_vector import ControlVector

Unit = Literal["vector", "residual"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Condition:
    """One vector, the blocks it is added to, and its strength. Without a vector or with strength 0: no steering.

    vector: name shown in reports. digest: identifies the vector in requests and keys.
    blocks: as in a request, `"all"`, `"8-19"` or `"15"`.
    alpha: strength, in units of the vector or of the mean residual norm (`unit`).
    scope: token positions, `"all"`, `"prompt"` or `"generation"`.
    """

    vector: str = ""
    digest: str = ""
    blocks: str = "all"
    alpha: float = 0.0
    unit: Unit = "vector"
    scope: str = "all"
    preserve_norm: bool = False

    @property
    def is_baseline(self) -> bool:
        return not self.digest or self.alpha == 0.0

    @property
    def key(self) -> str:
        """Identifies the condition in files. Conditions with the same effect have the same key."""
        if self.is_baseline:
            return "baseline"
        norm = "|norm" if self.preserve_norm else ""
        return f"{self.digest}|{self.blocks}|{self.alpha:.6g}|{self.unit}|{self.scope}{norm}"

    @property
    def steering(self) -> dict[str, Any] | None:
        """The `steering` field of a request; None for no steering."""
        if self.is_baseline:
            return None
        edit = {
            "vector": self.digest,
            "scale": self.alpha,
            "unit": self.unit,
            "blocks": self.blocks,
            "scope": self.scope,
        }
        return {"edits": [edit], "preserve_norm": self.preserve_norm}


BASELINE = Condition()
"""No steering."""

Against = Literal["wrong", "random"]

SCRAMBLED_CHARS = 75
"""Number of characters of the prompt that are permuted to make a random negative, as in the paper."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Contrast:
    """Two texts, each a prompt and the beginning of an answer."""

    positive: tuple[str, str]
    negative: tuple[str, str]


def contrasts(items: Sequence[Item], against: Against, *, seed: int = 0) -> list[Contrast]:
    """Make one contrast per item.

    The positive is the prompt with its right answer. The negative depends on `against`: with `"wrong"`, the prompt
    with one of its wrong answers; with `"random"`, a permutation of the prompt's first characters, as in Højer et al.
    (2025).

    Raises:
        EvaluationError: `against` is `"wrong"`, and an item has a single answer.
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
                f"{item.where or item.id}: the item has no wrong answer; use --against random, or --vector."
            )
        made.append(Contrast(positive=(item.prompt, item.target), negative=negative))
    return made


def with_shuffled_labels(pairs: Sequence[Contrast], *, seed: int = 0) -> list[Contrast]:
    """The same pairs, with positive and negative swapped in a random half of them."""
    swapped = set(Random(f"shuffled labels {seed}").sample(range(len(pairs)), len(pairs) // 2))
    return [
        replace(pair, positive=pair.negative, negative=pair.positive) if number in swapped else pair
        for number, pair in enumerate(pairs)
    ]


def random_like(vector: ControlVector, *, seed: int) -> ControlVector:
    """A random direction at every block of the vector, with the norm of the vector at that block."""
    random = np.random.default_rng(seed)
    rows = {block: random.standard_normal(vector.hidden_size) for block in vector.blocks}
    return as_long_as(vector, rows, method="control: random direction")


def as_long_as(vector: ControlVector, rows: dict[int, np.ndarray], *, method: str) -> ControlVector:
    """A vector of `rows`, scaled to the norm of `vector` at each of its blocks; zero rows stay zero.

    rows: block -> direction of shape `[hidden_size]`. method: noted in the metadata.
    """
    directions = {}
    for block in vector.blocks:
        row = np.asarray(rows[block], dtype=np.float64)
        length = float(np.linalg.norm(row))
        directions[block] = (row * (vector.norms[block] / length if length else 0.0)).astype(np.float32)
    return ControlVector(directions=directions, metadata=vector.metadata.model_copy(update={"method": method}))
