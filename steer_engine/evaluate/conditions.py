"""One way of steering that is tried on every item."""

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
    """A vector at blocks with a strength; no vector or strength 0 is no steering at all.

    vector: its name, for people. digest: what it is; requests and keys go by it.
    blocks: as in a request, `"all"`, `"8-19"` or `"15"`.
    alpha: in units of the vector, or of the mean residual norm.
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
        """Names the condition in files; equal for conditions that do the same."""
        if self.is_baseline:
            return "baseline"
        norm = "|norm" if self.preserve_norm else ""
        return f"{self.digest}|{self.blocks}|{self.alpha:.6g}|{self.unit}|{self.scope}{norm}"

    @property
    def steering(self) -> dict[str, Any] | None:
        """The `steering` field of a request."""
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


def random_like(vector: ControlVector, *, seed: int) -> ControlVector:
    """A random direction at every block of the vector, as long as the vector's there."""
    random = np.random.default_rng(seed)
    rows = {block: random.standard_normal(vector.hidden_size) for block in vector.blocks}
    return as_long_as(vector, rows, method="control: random direction")


def as_long_as(vector: ControlVector, rows: dict[int, np.ndarray], *, method: str) -> ControlVector:
    """Other directions at the blocks of a vector, each as long as the vector's; a zero one stays zero."""
    directions = {}
    for block in vector.blocks:
        row = np.asarray(rows[block], dtype=np.float64)
        length = float(np.linalg.norm(row))
        directions[block] = (row * (vector.norms[block] / length if length else 0.0)).astype(np.float32)
    return ControlVector(directions=directions, metadata=vector.metadata.model_copy(update={"method": method}))
