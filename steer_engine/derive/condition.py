"""When to steer: choose blocks and a threshold that tell prompts of two classes apart. Pure NumPy, without an engine.

The value of a condition is a number per prompt. `Readout` reduces captured rows to one number per block, `choose` picks
blocks and threshold on a part of the prompts, and measures them on the others.

Shape suffixes: N prompts, T token rows, L blocks, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steer_engine.derive.fit import auroc
from steer_engine.derive.moments import Array, Rows, require_finite
from steer_engine.errors import DerivationError
from steer_engine.vectors.metadata import At, FittedCondition, Measure

MIN_PROMPTS = 4
"""Prompts of a class. With fewer, a threshold would be chosen on one or two."""

FEW_HELD_OUT = 20
"""With fewer held-out prompts, one of them changes an accuracy by more than 5 points."""

WEAK_AUROC = 0.75
"""Below this, a condition is wrong about at least one pair of prompts in four."""

MAX_SHIFT = 0.01
"""A threshold is rounded to as few digits as keep it this close to the middle of its gap, as a share of the gap."""

Indexes = npt.NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class Readout:
    """How captured rows become numbers.

    directions_LD: the vector's directions as they are in its file, at the captured blocks. measure: number of a token.
    at: which tokens of a prompt count.
    """

    directions_LD: Rows
    measure: Measure
    at: At

    def numbers(self, rows_LTD: Rows) -> Array:
        """One number per block and token `[L, T]`, in float64: <x, v>, or cos(x, v), which is 0 if a norm is 0.

        Raises:
            DerivationError: a row is not finite.
        """
        require_finite(rows_LTD)
        numbers_LT = np.empty(rows_LTD.shape[:2])
        for index, (rows_TD, direction_D) in enumerate(zip(rows_LTD, self.directions_LD, strict=True)):
            wide_TD, wide_D = rows_TD.astype(np.float64), direction_D.astype(np.float64)
            dot_T = wide_TD @ wide_D
            if self.measure == "cosine":
                size_T = np.linalg.norm(wide_TD, axis=1) * np.linalg.norm(wide_D)
                dot_T = np.divide(dot_T, size_T, out=np.zeros_like(dot_T), where=size_T > 0.0)
            numbers_LT[index] = dot_T
        return numbers_LT

    def value(self, numbers_LT: Array) -> Array:
        """One number per block `[L]` from those of all tokens of a prompt, or of its last tokens."""
        if self.at == "last_prompt_token":
            return numbers_LT[:, -1]
        value_L: Array = numbers_LT.max(axis=1) if self.at == "max_prompt" else numbers_LT.mean(axis=1)
        return value_L


def over_blocks(values_NL: Array, at: At) -> Array:
    """The value of a condition that lists several blocks `[N]`: their largest for `max_prompt`, else their mean."""
    value_N: Array = values_NL.max(axis=1) if at == "max_prompt" else values_NL.mean(axis=1)
    return value_N


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A threshold: the condition holds above it (`above`) or below it.

    f1: on the values that it was chosen on. margin: width of the gap around it, as a share of their range.
    """

    above: bool
    threshold: float
    f1: float
    margin: float

    def holds(self, values_N: Array) -> npt.NDArray[np.bool_]:
        """Whether the condition holds, for each value. A value on the threshold does not hold."""
        return values_N > self.threshold if self.above else values_N < self.threshold


def best_cut(positive_N: Array, negative_N: Array) -> Cut | None:
    """The threshold between two neighbouring values with the largest F1; of equal ones, that of the widest gap.

    A threshold beyond all values would hold for every prompt or for none; it is not a candidate. The condition holds
    above the threshold if positives are larger (AUROC of at least 0.5), else below it.

    Returns:
        None if all values are equal.
    """
    above = auroc(positive_N, negative_N) >= 0.5
    sign = 1.0 if above else -1.0
    values, place = np.unique(sign * np.concatenate([positive_N, negative_N]), return_inverse=True)
    if len(values) < 2:
        return None
    is_positive = np.arange(len(place)) < len(positive_N)
    positives, negatives = (np.bincount(place[side], minlength=len(values)) for side in (is_positive, ~is_positive))
    # Cut i is between values i and i + 1; the condition holds for the values from i + 1 on.
    hits, false_alarms = (np.cumsum(side[::-1])[::-1][1:] for side in (positives, negatives))
    f1 = 2.0 * hits / (hits + false_alarms + len(positive_N))
    gaps = np.diff(values)
    best = int(np.lexsort((-gaps, -f1))[0])
    threshold = _between(float(values[best]), float(values[best + 1]))
    margin = float(gaps[best] / (values[-1] - values[0]))
    return Cut(above=above, threshold=sign * threshold + 0.0, f1=float(f1[best]), margin=margin)


def cut_at_rate(positive_N: Array, negative_N: Array, rate: float) -> Cut:
    """The lowest threshold above which a new negative lies with a probability of at most `rate`.

    With n negatives, a new one is above the k-th largest of them with probability k / (n + 1). So k is the largest that
    keeps this at most `rate`; if even k = 1 is above it (`reachable_rate`), the threshold is the largest negative's.
    The threshold is put between this negative and the next larger value of either class.
    """
    rank = max(1, int(rate * (len(negative_N) + 1) + 1e-9))
    low = float(np.sort(negative_N)[-rank])
    scores = np.concatenate([positive_N, negative_N])
    larger = scores[scores > low]
    threshold = _between(low, float(larger.min())) if len(larger) else low
    hits, false_alarms = int((positive_N > threshold).sum()), int((negative_N > threshold).sum())
    spread = float(np.ptp(scores))
    return Cut(
        above=True,
        threshold=threshold,
        f1=2.0 * hits / (hits + false_alarms + len(positive_N)),
        margin=float(larger.min() - low) / spread if len(larger) else 0.0,
    )


def reachable_rate(num_negative: int) -> float:
    """The lowest false-positive rate that `cut_at_rate` can keep with this many negatives."""
    return 1.0 / (num_negative + 1)


def _between(low: float, high: float) -> float:
    """About the middle of two numbers, with few digits: at least `low` and below `high`."""
    middle = low + 0.5 * (high - low)
    for digits in range(3, 17):
        short = float(f"{middle:.{digits}g}")
        if low <= short < high and abs(short - middle) <= MAX_SHIFT * (high - low):
            return short
    return middle if middle < high else low


@dataclass(frozen=True, kw_only=True)
class Quality:
    """How well a threshold tells held-out prompts apart. num_positive, num_negative: of those prompts.

    recall: true-positive rate.
    """

    f1: float
    precision: float
    recall: float
    accuracy: float
    false_positive_rate: float
    auroc: float
    num_positive: int
    num_negative: int

    @classmethod
    def of(cls, cut: Cut, positive_N: Array, negative_N: Array) -> Quality:
        """auroc: that positives are on the side of the cut where the condition holds; a tie counts half."""
        hits, false_alarms = int(cut.holds(positive_N).sum()), int(cut.holds(negative_N).sum())
        area = auroc(positive_N, negative_N)
        return cls(
            f1=2.0 * hits / (hits + false_alarms + len(positive_N)),
            precision=hits / (hits + false_alarms) if hits else 0.0,
            recall=hits / len(positive_N),
            accuracy=(hits + len(negative_N) - false_alarms) / (len(positive_N) + len(negative_N)),
            false_positive_rate=false_alarms / len(negative_N),
            auroc=area if cut.above else 1.0 - area,
            num_positive=len(positive_N),
            num_negative=len(negative_N),
        )

    @property
    def f1_of_always(self) -> float:
        """F1 of a condition that holds for every prompt."""
        return 2.0 * self.num_positive / (2.0 * self.num_positive + self.num_negative)


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """Blocks with the threshold that was chosen on the training prompts, and its quality on the held-out ones.

    auroc: on the training prompts, at least 0.5. positive_N, negative_N: values of all prompts.
    """

    blocks: tuple[int, ...]
    auroc: float
    cut: Cut
    held_out: Quality
    positive_N: Array
    negative_N: Array


@dataclass(frozen=True, kw_only=True, eq=False)
class ConditionFit:
    """The chosen condition, and every single block. Blocks that give all training prompts one value are left out."""

    measure: Measure
    at: At
    chosen: Candidate
    by_block: Mapping[int, Candidate]
    chat: bool = False
    notes: tuple[str, ...] = ()
    """Warnings about the prompts."""

    @property
    def condition(self) -> FittedCondition:
        """For the vector's metadata."""
        cut, held_out = self.chosen.cut, self.chosen.held_out
        return FittedCondition(
            blocks=self.chosen.blocks,
            measure=self.measure,
            at=self.at,
            above=cut.threshold if cut.above else None,
            below=None if cut.above else cut.threshold,
            f1=held_out.f1,
            precision=held_out.precision,
            recall=held_out.recall,
            accuracy=held_out.accuracy,
            auroc=held_out.auroc,
            held_out={"positive": held_out.num_positive, "negative": held_out.num_negative},
            chat=self.chat,
        )

    def require_useful(self) -> None:
        """Raise DerivationError if the condition is no better than chance, on the training or the held-out prompts."""
        for part, area in (("training", self.chosen.auroc), ("held-out", self.chosen.held_out.auroc)):
            if area <= 0.5:
                raise DerivationError(
                    f"The best block ({_listed(self.chosen.blocks)}) has an AUROC of {area:.3f} on the {part} prompts; "
                    "0.5 is chance. This vector does not tell the prompts apart. Choose another --at or --measure, "
                    "more prompts, or another vector."
                )

    def warnings(self) -> list[str]:
        """One sentence per reason to trust the condition less."""
        held_out = self.chosen.held_out
        count = held_out.num_positive + held_out.num_negative
        found = list(self.notes)
        if count < FEW_HELD_OUT:
            found.append(
                f"only {count} prompts were held out, so its numbers are rough; give more prompts, "
                f"for example {2 * FEW_HELD_OUT} of each class."
            )
        if held_out.auroc < WEAK_AUROC:
            found.append(f"the held-out AUROC is only {held_out.auroc:.3f}; expect many wrong decisions.")
        if held_out.f1 <= held_out.f1_of_always:
            found.append(
                f"the held-out F1 of {held_out.f1:.3f} is not above that of steering every prompt "
                f"({held_out.f1_of_always:.3f})."
            )
        return found


def split(count: int, held_out: float, rng: np.random.Generator) -> tuple[Indexes, Indexes]:
    """Indexes of the training and of the held-out prompts of a class, ascending. At least 2 and 1 of them.

    held_out: the share of the second part.
    """
    size = min(count - 2, max(1, round(held_out * count)))
    order = rng.permutation(count)
    return np.sort(order[size:]), np.sort(order[:size])


def require_enough(count: int, label: str, source: str, *, least: int = MIN_PROMPTS, what: str = "condition") -> None:
    """Raise DerivationError if a class has too few prompts. least: how many are enough; what: what needs them."""
    if count < least:
        raise DerivationError(
            f"{source}: {count} {label} prompt(s) are too few; a {what} needs at least {least} of each class, "
            f"and {2 * FEW_HELD_OUT} for numbers to rely on. Add prompts."
        )


def choose(
    positive_NL: Array,
    negative_NL: Array,
    blocks: Sequence[int],
    *,
    measure: Measure,
    at: At,
    num_blocks: int = 1,
    held_out: float = 0.3,
    seed: int = 0,
) -> ConditionFit:
    """Choose blocks and threshold on one part of the prompts, and measure them on the rest.

    The best block has the largest AUROC on the training prompts, then the widest gap around its threshold, then the
    smallest number.

    Args:
        positive_NL, negative_NL: values of the prompts of each class.
        blocks: their block numbers, in the order of the second axis.
        num_blocks: blocks to combine (`over_blocks`), best first. Those whose positives are on the other side of the
            threshold than the best block's are not taken.
        held_out: share of each class that is only measured on.
        seed: of the split. Equal seeds and numbers of prompts give equal splits.

    Raises:
        DerivationError: a class has too few prompts, there are fewer blocks than `num_blocks`, or every block gives all
            training prompts the same value.
    """
    require_enough(len(positive_NL), "positive", "The prompts")
    require_enough(len(negative_NL), "negative", "The prompts")
    if not 0.0 < held_out < 1.0:
        raise DerivationError(f"A held-out share of {held_out:g} is not between 0 and 1; 0.3 is usual.")
    if not 1 <= num_blocks <= len(blocks):
        raise DerivationError(f"--num-blocks {num_blocks}: choose 1 to {len(blocks)}, the number of candidate blocks.")
    rng = np.random.default_rng(seed)
    parts = [split(len(side_NL), held_out, rng) for side_NL in (positive_NL, negative_NL)]

    def candidate(columns: Sequence[int]) -> Candidate | None:
        columns = sorted(columns)
        positive_N, negative_N = (over_blocks(side_NL[:, columns], at) for side_NL in (positive_NL, negative_NL))
        (positive_train, positive_out), (negative_train, negative_out) = parts
        trained = positive_N[positive_train], negative_N[negative_train]
        if (cut := best_cut(*trained)) is None:
            return None
        area = auroc(*trained)
        return Candidate(
            blocks=tuple(blocks[column] for column in columns),
            auroc=max(area, 1.0 - area),
            cut=cut,
            held_out=Quality.of(cut, positive_N[positive_out], negative_N[negative_out]),
            positive_N=positive_N,
            negative_N=negative_N,
        )

    singles = {column: each for column in range(len(blocks)) if (each := candidate([column])) is not None}
    if not singles:
        raise DerivationError(
            f"Every prompt has the same value at block(s) {_listed(blocks)}, so no threshold tells the classes apart. "
            "Choose another --at: with a chat template, early blocks are equal at the last token. Or other --blocks."
        )
    ranked = sorted(singles, key=lambda column: (-singles[column].auroc, -singles[column].cut.margin, blocks[column]))
    chosen = singles[ranked[0]]
    combined = [column for column in ranked if singles[column].cut.above == chosen.cut.above][:num_blocks]
    if len(combined) > 1:
        chosen = candidate(combined) or chosen
    by_block = {blocks[column]: each for column, each in singles.items()}
    return ConditionFit(measure=measure, at=at, chosen=chosen, by_block=by_block)


def _listed(blocks: Sequence[int]) -> str:
    return ", ".join(map(str, blocks))
