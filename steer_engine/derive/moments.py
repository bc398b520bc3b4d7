"""Sums over rows of the residual stream: all that most methods need, however many texts there are.

Shape suffixes: N texts, L blocks, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from steer_engine.errors import DerivationError

Rows = npt.NDArray[np.float32]
Sums = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Moments:
    """Sums of one side of a contrast. Adding is exact in order: merge parts in one fixed order for equal bits.

    count: texts. sum_LD: sum of their rows. norm_L: sum of |x| over `norm_count` token rows.
    """

    count: int
    sum_LD: Sums
    norm_count: int
    norm_L: Sums

    @classmethod
    def zero(cls, num_blocks: int, hidden_size: int) -> Moments:
        return cls(count=0, sum_LD=np.zeros((num_blocks, hidden_size)), norm_count=0, norm_L=np.zeros(num_blocks))

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Moments:
        """Moments of texts, summed in their order in float64."""
        first = samples[0].row_LD
        total = cls.zero(*first.shape)
        sum_LD, norm_L = total.sum_LD, total.norm_L
        for sample in samples:
            sum_LD += sample.row_LD
            norm_L += sample.norm_L
        return cls(count=len(samples), sum_LD=sum_LD, norm_count=sum(s.norm_count for s in samples), norm_L=norm_L)

    def __add__(self, other: Moments) -> Moments:
        return Moments(
            count=self.count + other.count,
            sum_LD=self.sum_LD + other.sum_LD,
            norm_count=self.norm_count + other.norm_count,
            norm_L=self.norm_L + other.norm_L,
        )

    @property
    def mean_LD(self) -> Sums:
        return self.sum_LD / self.count


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One text: the row that stands for it at each block, and the norms of the token rows behind it.

    row_LD: float64. norm_L: sum of |x| over `norm_count` token rows.
    """

    row_LD: Sums
    norm_L: Sums
    norm_count: int


def summarise(rows_LTD: Rows, *, skip_first: bool) -> Sample:
    """Mean over the token rows of a text, and the sum of their norms, in float64.

    skip_first: the rows begin with the text's first token, whose norm is left out if there are others. Models park
        attention there: its norm is tens to hundreds of times that of any other row and would drown the mean.

    Raises:
        DerivationError: a row is not finite.
    """
    if not np.isfinite(rows_LTD).all():
        raise DerivationError("The model's residual stream is not finite here; another dtype (bfloat16) may help.")
    rows = rows_LTD.astype(np.float64)
    counted = rows[:, 1:] if skip_first and rows.shape[1] > 1 else rows
    norms_LT = np.linalg.norm(counted, axis=-1)
    return Sample(row_LD=rows.mean(axis=1), norm_L=norms_LT.sum(axis=1), norm_count=counted.shape[1])


Array = npt.NDArray[np.float64]

FOLDS = 5
MIN_PAIRS = 2 * FOLDS
"""Fewer leave less than two held-out pairs a fold: a number that says nothing is not given."""


def auroc(positive_N: Array, negative_N: Array) -> float:
    """Probability that a random positive scores above a random negative, ties counting half."""
    scores = np.concatenate([positive_N, negative_N])
    _, place, count = np.unique(scores, return_inverse=True, return_counts=True)
    rank_N = (np.cumsum(count) - (count - 1) / 2.0)[place]
    num_positive, num_negative = len(positive_N), len(negative_N)
    wins = rank_N[:num_positive].sum() - num_positive * (num_positive + 1) / 2.0
    return float(wins / (num_positive * num_negative))


def held_out_auroc(positive_ND: Array, negative_ND: Array, method: Callable[[Array, Array], Array]) -> float | None:
    """Mean AUROC over folds: the direction comes from the other folds. None for too few texts.

    A fold is every `FOLDS`-th text of either side: whole pairs where texts are paired, and sets sorted by topic are
    spread evenly.
    """
    if min(len(positive_ND), len(negative_ND)) < MIN_PAIRS:
        return None
    positive_fold_N, negative_fold_N = (np.arange(len(side)) % FOLDS for side in (positive_ND, negative_ND))
    areas = []
    for fold in range(FOLDS):
        positive_out, negative_out = positive_fold_N == fold, negative_fold_N == fold
        direction_D = method(positive_ND[~positive_out], negative_ND[~negative_out])
        areas.append(auroc(positive_ND[positive_out] @ direction_D, negative_ND[negative_out] @ direction_D))
    return float(np.mean(areas))


def mean_difference(positive_ND: Array, negative_ND: Array) -> Array:
    """`diffmean` from rows. `[D]`"""
    difference_D: Array = positive_ND.mean(axis=0) - negative_ND.mean(axis=0)
    return difference_D


def explained_variance(differences: Iterable[Array], direction_D: Array) -> float | None:
    """Share of the squared differences of pairs, given in groups `[N, D]`, that lies along the direction.

    None where there is no direction, or no difference.
    """
    length = float(np.linalg.norm(direction_D))
    along = total = 0.0
    for part_ND in differences:
        along += float(((part_ND @ direction_D) ** 2).sum())
        total += float((part_ND**2).sum())
    return min(1.0, along / (length**2 * total)) if length > 0.0 and total > 0.0 else None
