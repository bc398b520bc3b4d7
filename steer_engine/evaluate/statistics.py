"""Metrics of an answer, from what the engine says of its next-token distribution. Pure NumPy, no engine.

Shape suffix: A answers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

CHOICE_METRICS = (
    "accuracy", "margin", "logp_correct", "logp_incorrect", "mass_correct", "mass_incorrect",
    "share_correct", "share_incorrect",
)  # fmt: skip
"""Numbers that need answers."""

SHIFT_METRICS = ("kl", "entropy", "top_changed")
"""Numbers of any distribution."""

EXACT_METRICS = ("accuracy", "distinct", "length")
"""Numbers of generated text."""


def choice_metrics(answer_A: npt.ArrayLike, correct: int) -> dict[str, float]:
    """What a distribution says about answers, from the log-probability (nats) of the token that decides for each.

    accuracy: 1 if the right answer is strictly more probable than each other one, else 0.
    logp_correct, logp_incorrect: log-probability (nats, whole vocabulary) of the right answer, and of all others
        together. mass_*: the same as probabilities.
    margin: log-probability of the right answer minus that of the best other one, a difference of logits.
    share_correct, share_incorrect: the same with the softmax restricted to the answers; they sum to 1.
    """
    answer_A = np.asarray(answer_A, dtype=np.float64)
    right = answer_A[correct]
    wrong_A = np.delete(answer_A, correct)
    wrong = _log_sum_exp(wrong_A)
    share = float(1.0 / (1.0 + np.exp(wrong - right)))
    return {
        "accuracy": float(right > wrong_A.max()),
        "margin": float(right - wrong_A.max()),
        "logp_correct": float(right),
        "logp_incorrect": wrong,
        "mass_correct": float(np.exp(right)),
        "mass_incorrect": float(np.exp(wrong)),
        "share_correct": share,
        "share_incorrect": 1.0 - share,
    }


def shift_metrics(kl: float, entropy: float, top_changed: bool) -> dict[str, float]:
    """How a distribution differs from the unsteered one.

    kl: KL(P_0 || P_alpha) in nats over the whole vocabulary. entropy: of P_alpha, in nats; becomes bits.
    top_changed: 1 if the most probable token is another one, else 0.
    """
    return {"kl": kl, "entropy": entropy / float(np.log(2.0)), "top_changed": float(top_changed)}


def exact_metrics(text: str, target: str, num_tokens: int) -> dict[str, float]:
    """accuracy: the generated text begins with the target, spaces at both ends aside, and goes on with no letter or
    digit. distinct: share of distinct words. length: tokens generated.
    """
    said, wanted = text.strip(), target.strip()
    rest = said[len(wanted) :]
    words = said.split()
    return {
        "accuracy": float(said.startswith(wanted) and not rest[:1].isalnum()),
        "distinct": len(set(words)) / len(words) if words else 0.0,
        "length": float(num_tokens),
    }


def _log_sum_exp(values: Array) -> float:
    highest = values.max()
    if highest == -np.inf:
        return -np.inf
    return float(highest + np.log(np.exp(values - highest).sum()))


RESAMPLES = 10_000
LEVEL = 0.95
CHUNK = 1 << 22
"""Random numbers at once."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean and its bootstrap percentile interval."""

    mean: float
    low: float
    high: float


def bootstrap(value_N: Array, *, seed: int = 0, resamples: int = RESAMPLES, level: float = LEVEL) -> Interval:
    """Mean of per-item numbers, with the percentile interval over resampled items. For a paired difference give the
    differences.
    """
    count = len(value_N)
    random = np.random.default_rng(seed)
    means: list[Array] = []
    left = resamples
    while left:
        rows = min(left, max(1, CHUNK // count))
        means.append(value_N[random.integers(0, count, (rows, count))].mean(axis=1))
        left -= rows
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return Interval(mean=float(value_N.mean()), low=float(low), high=float(high))


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """Steered against unsteered on the same items.

    gained, lost: items that became right, and that became wrong. p: McNemar's exact test, two-sided.
    """

    before: float
    after: float
    difference: Interval
    gained: int
    lost: int
    p: float


def compare(before_N: Array, after_N: Array, *, seed: int = 0) -> Paired:
    """Accuracy before and after, from 0/1 per item, in the same order."""
    gained = int(((after_N == 1.0) & (before_N == 0.0)).sum())
    lost = int(((after_N == 0.0) & (before_N == 1.0)).sum())
    return Paired(
        before=float(before_N.mean()),
        after=float(after_N.mean()),
        difference=bootstrap(after_N - before_N, seed=seed),
        gained=gained,
        lost=lost,
        p=mcnemar(gained, lost),
    )


def mcnemar(gained: int, lost: int) -> float:
    """Probability of a split of the changed items at least as uneven, if each change were a coin's toss (exact)."""
    from scipy.stats import binomtest

    return 1.0 if gained + lost == 0 else float(binomtest(gained, gained + lost, 0.5).pvalue)


def holm(p_by_name: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected for their number by Holm's step-down method; the order of the names is kept."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, (name, p) in enumerate(sorted(p_by_name.items(), key=lambda entry: entry[1])):
        highest = max(highest, min(1.0, (len(p_by_name) - rank) * p))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_by_name}


def slope(alphas: Array, values: Array) -> float:
    """Least-squares slope of a mean against strength: for `margin` the vector's steerability, in nats per unit."""
    centred = alphas - alphas.mean()
    return float(centred @ (values - values.mean()) / (centred @ centred))
