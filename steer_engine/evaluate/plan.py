"""Plans: the settings of an evaluation, checked before an engine starts, and the plans of the paper's protocol."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Literal

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.conditions import Against, Condition, Unit
from steer_engine.fields import block_ranges, parse_blocks
from steer_engine.vectors.control_vector import ControlVector

Score = Literal["accuracy", "share_correct"]

DEFAULT_ALPHAS = tuple(n / 2 for n in range(-4, 5))
MAX_ALPHAS = 1000

PAPER_METHODS = {"mean": "Reading", "diffmean": "Contrastive", "pca_centred": "PCA contrastive"}
"""Our name of a method -> its name in the paper, Højer et al. (ICLR 2025)."""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How to derive a vector from the task: the method, and the negatives that right answers are contrasted with."""

    method: str
    against: Against = "wrong"

    @property
    def name(self) -> str:
        return f"{self.method}-{self.against}"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Vectors, and the grid of blocks and strengths that the validation split chooses from.

    recipes: vectors to derive from the derive split. vectors: existing vectors by name.
    blocks: block ranges to try; empty: single blocks at a third, half and two thirds of the depth, or the next to them
        that a vector has.
    alphas: strengths to try, in units of `unit`. Strength 0 always runs too.
    score: metric to maximise on the validation split. Ties go to the larger share of right answers.
    max_kl: conditions with a larger mean KL on neutral texts, in nats, are not chosen.
    random_controls: number of random directions to compare with.

    Raises:
        EvaluationError: a setting is invalid, there is no vector, or two vectors have the same name.
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
            raise EvaluationError("There is nothing to evaluate; give a vector, or a method to derive one.")
        if len(set(names)) < len(names):
            raise EvaluationError(f"Two vectors have the same name: {', '.join(names)}.")
        if not self.steps:
            raise EvaluationError("All strengths are 0; give other strengths, such as --alphas=-2:2:0.5.")
        for blocks in self.blocks:
            try:
                parse_blocks(blocks)
            except ValueError as error:
                raise EvaluationError(f"--blocks: {error}.") from None

    @property
    def steps(self) -> tuple[float, ...]:
        """The strengths other than 0."""
        return tuple(alpha for alpha in self.alphas if alpha != 0.0)

    def blocks_for(self, num_blocks: int) -> tuple[str, ...]:
        """Block ranges to try on a model.

        Raises:
            EvaluationError: a range has blocks that the model does not have.
        """
        require_blocks(self.blocks, num_blocks)
        # Single blocks: the residual stream carries an edit to all later blocks, so a vector that is added at ten
        # blocks counts about ten times (SmolLM2-135M, IOI, strength 0.5: KL 0.03 at block 15, 5.0 at 10-19).
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
        """All steered conditions of a vector. The range `"all"` means all blocks that it has a direction for.

        Raises:
            EvaluationError: the vector has no direction for a block of another range.
        """
        ranges = self.blocks_for(num_blocks)
        if not self.blocks:
            nearest = (min(vector.blocks, key=lambda block: abs(block - int(place))) for place in ranges)
            ranges = tuple(dict.fromkeys(map(str, nearest)))
        for blocks in ranges:
            missing = set(parse_blocks(blocks) or vector.blocks) - set(vector.blocks)
            if missing:
                raise EvaluationError(
                    f"Vector {name} has no direction for block(s) {block_ranges(sorted(missing))}; "
                    f"it has {block_ranges(vector.blocks)}. "
                    "Choose --blocks from these."
                )
        return [self.condition(name, vector, blocks, alpha) for blocks, alpha in product(ranges, self.steps)]


def require_blocks(ranges: Sequence[str], num_blocks: int) -> None:
    """Raise EvaluationError if a range has another form, or blocks that the model does not have."""
    for blocks in ranges:
        try:
            last = (parse_blocks(blocks) or (0,))[-1]
        except ValueError as error:
            raise EvaluationError(f"--blocks: {error}.") from None
        if last >= num_blocks:
            raise EvaluationError(f"--blocks {blocks}: the model's blocks are 0 to {num_blocks - 1}.")


def paper_plans(num_blocks: int, alphas: Sequence[float], seed: int) -> dict[str, Plan]:
    """Plans of the paper's protocol (`"paper"`) and of a stricter one (`"ours"`).

    The paper uses three vectors from prompts with right answers against random text, at the middle block. It reports
    the accuracy of the best strength on the items that chose the strength. Both plans here also report accuracy on
    items that chose nothing, with controls. Ours derives a vector from right against wrong answers, and chooses the
    blocks as well.
    """
    paper = Plan(
        recipes=tuple(Recipe(method=method, against="random") for method in PAPER_METHODS),
        blocks=(str(num_blocks // 2),),
        alphas=tuple(alphas),
        seed=seed,
    )
    return {"paper": paper, "ours": Plan(recipes=(Recipe(method="diffmean", against="wrong"),), seed=seed)}


def parse_alphas(text: str) -> tuple[float, ...]:
    """Strengths from `"first:last:step"` (both ends included) or `"a,b,c"`, ascending.

    Raises:
        EvaluationError: the text has another form, or the strengths are too many or not finite.
    """
    forms = "valid are '-2:2:0.5' (first, last, step) and '-1,0.5,2'"
    if re.fullmatch(rf"{_NUMBER}:{_NUMBER}:{_NUMBER}", text):
        first, last, step = map(float, text.split(":"))
        if step <= 0 or last < first or (last - first) / step > MAX_ALPHAS or not math.isfinite(last - first):
            raise EvaluationError(
                f"Strengths {text!r}: valid are a positive step, first <= last, and at most {MAX_ALPHAS} steps."
            )
        count = math.floor((last - first) / step + 1e-9)  # 0.1 is not exact in binary
        alphas: Sequence[float] = [first + i * step for i in range(count + 1)]
    elif re.fullmatch(rf"{_NUMBER}(?:,{_NUMBER})*", text):
        alphas = [float(part) for part in text.split(",")]
    else:
        raise EvaluationError(f"Strengths {text[:64]!r} are not valid; {forms}.")
    if len(alphas) > MAX_ALPHAS or not all(map(math.isfinite, alphas)):
        raise EvaluationError(f"Strengths must be finite, and at most {MAX_ALPHAS} of them.")
    return tuple(sorted({round(alpha, 9) + 0.0 for alpha in alphas}))
