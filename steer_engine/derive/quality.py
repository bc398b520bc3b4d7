"""How well a direction tells positives from negatives that it has not seen.

Shape suffixes: N texts, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

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
