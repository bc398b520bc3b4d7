"""What an evaluation does, checked before an engine starts."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.conditions import Against, Condition, Unit
from steer_engine.spec import parse_blocks
from steer_engine.vectors.control_vector import ControlVector

Score = Literal["accuracy", "share_correct"]

DEFAULT_ALPHAS = tuple(n / 2 for n in range(-4, 5))
MAX_ALPHAS = 1000

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A vector made from the task itself: a method, and what right answers are set against."""

    method: str
    against: Against = "wrong"

    @property
    def name(self) -> str:
        return f"{self.method}-{self.against}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Vectors, and the grid of blocks and strengths from which the validation split chooses.

    recipes: vectors to derive from the task's derive split. vectors: finished ones, by name.
    blocks: block ranges to try; none = single blocks at a third, half and two thirds of the depth.
    alphas: strengths to try, in units of `unit`; 0 always runs as well.
    score: what is maximised on the validation split; ties go to the larger share of the right answers.
    max_kl: conditions with a larger mean KL on neutral texts can't be chosen.
    random_controls: random directions that are tried in the vector's place.
    """

    recipes: tuple[Recipe, ...] = ()
    vectors: dict[str, ControlVector] = field(default_factory=dict)
    blocks: tuple[str, ...] = ()
    alphas: tuple[float, ...] = DEFAULT_ALPHAS
    unit: Unit = "vector"
    scope: str = "all"
    preserve_norm: bool = False
    score: Score = "accuracy"
    max_kl: float | None = None
    random_controls: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        names = [*(recipe.name for recipe in self.recipes), *self.vectors]
        if not names:
            raise EvaluationError("There is nothing to evaluate: give a vector, or a method to derive one by.")
        if len(set(names)) < len(names):
            raise EvaluationError(f"Two vectors have the same name: {', '.join(names)}.")
        if not self.steps:
            raise EvaluationError("All strengths are 0; give others, such as --alphas=-2:2:0.5.")
        for blocks in self.blocks:
            try:
                parse_blocks(blocks)
            except ValueError as error:
                raise EvaluationError(f"--blocks: {error}.") from None

    @property
    def steps(self) -> tuple[float, ...]:
        """The strengths that steer."""
        return tuple(alpha for alpha in self.alphas if alpha != 0.0)

    def blocks_for(self, num_blocks: int) -> tuple[str, ...]:
        """Block ranges to try on a model.

        Raises:
            EvaluationError: a range that the model has not.
        """
        for blocks in self.blocks:
            last = (parse_blocks(blocks) or (0,))[-1]
            if last >= num_blocks:
                raise EvaluationError(f"--blocks {blocks}: the model's blocks are 0 to {num_blocks - 1}.")
        # Single blocks: the difference of a pair is carried on by the stream, so that a vector added at each of ten
        # blocks counts about ten times over (SmolLM2-135M, IOI, strength 0.5: KL 0.03 at block 15, 5.0 at 10-19).
        places = (num_blocks // 3, num_blocks // 2, 2 * num_blocks // 3)
        return self.blocks or tuple(dict.fromkeys(map(str, places)))

    def condition(self, name: str, vector: ControlVector, blocks: str, alpha: float) -> Condition:
        return Condition(
            vector=name,
            digest=vector.digest,
            blocks=blocks,
            alpha=alpha,
            unit=self.unit,
            scope=self.scope,
            preserve_norm=self.preserve_norm,
        )

    def grid(self, name: str, vector: ControlVector, num_blocks: int) -> list[Condition]:
        """All steered conditions of a vector; blocks that it has no direction for are left out of "all" alone.

        Raises:
            EvaluationError: the vector has no direction in a range.
        """
        ranges = self.blocks_for(num_blocks)
        for blocks in ranges:
            missing = set(parse_blocks(blocks) or vector.blocks) - set(vector.blocks)
            if missing:
                raise EvaluationError(
                    f"Vector {name} has no direction for block(s) {sorted(missing)}; it has {list(vector.blocks)}. "
                    "Choose --blocks among them."
                )
        return [self.condition(name, vector, blocks, alpha) for blocks, alpha in product(ranges, self.steps)]


def parse_alphas(text: str) -> tuple[float, ...]:
    """Strengths from `"first:last:step"` (both ends included) or `"a,b,c"`, ascending.

    Raises:
        EvaluationError: with the valid forms.
    """
    forms = "valid are '-2:2:0.5' (first, last, step) and '-1,0.5,2'"
    if re.fullmatch(rf"{_NUMBER}:{_NUMBER}:{_NUMBER}", text):
        first, last, step = map(float, text.split(":"))
        if step <= 0 or last < first or (last - first) / step > MAX_ALPHAS or not math.isfinite(last - first):
            raise EvaluationError(f"Strengths {text!r}: step must lead from first to last in at most {MAX_ALPHAS}.")
        count = math.floor((last - first) / step + 1e-9)  # 0.1 is no binary fraction
        alphas: Sequence[float] = [first + i * step for i in range(count + 1)]
    elif re.fullmatch(rf"{_NUMBER}(?:,{_NUMBER})*", text):
        alphas = [float(part) for part in text.split(",")]
    else:
        raise EvaluationError(f"Strengths {text[:64]!r} are not readable; {forms}.")
    if len(alphas) > MAX_ALPHAS or not all(map(math.isfinite, alphas)):
        raise EvaluationError(f"Strengths must be finite and at most {MAX_ALPHAS}.")
    return tuple(sorted({round(alpha, 9) + 0.0 for alpha in alphas}))
