"""Metrics of single answers, and statistics over items: intervals, tests and slopes. NumPy and SciPy, no engine.

Shape suffixes: A answers, N items.
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
"""Metrics of a question with answers."""

SHIFT_METRICS = ("kl", "entropy", "top_changed")
"""Metrics of any next-token distribution."""

EXACT_METRICS = ("accuracy", "distinct", "length")
"""Metrics of generated text."""

ANSWER_KEY = "answer_{}"
"""Name of the metric with the log-probability (nats) of the answer at an index, if a search keeps it."""

RESAMPLES = 10_000
CONFIDENCE = 0.95
CHUNK = 1 << 22
"""Random numbers drawn at once."""


def choice_metrics(answer_A: npt.ArrayLike, correct: int) -> dict[str, float]:
    """Metrics of a choice, from the log-probability (nats, whole vocabulary) of the deciding token of each answer.

    accuracy: 1 if the right answer is strictly more probable than every other answer, else 0.
    margin: log-probability of the right answer minus that of the best other answer, in nats; a difference of logits.
    logp_correct, logp_incorrect: log-probability of the right answer, and of all other answers together.
    mass_correct, mass_incorrect: the same as probabilities.
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
    """Metrics of a distribution compared with the unsteered one.

    kl: KL(P_0 || P_alpha) in nats over the whole vocabulary. entropy: of P_alpha, given in nats, returned in bits.
    top_changed: whether the most probable token changed; returned as 1 or 0.
    """
    return {"kl": kl, "entropy": entropy / float(np.log(2.0)), "top_changed": float(top_changed)}


def exact_metrics(text: str, target: str, num_tokens: int) -> dict[str, float]:
    """Metrics of an exact match.

    accuracy: 1 if the generated text begins with the target and the next character is no letter or digit, else 0;
        leading and trailing spaces are ignored.
    distinct: share of distinct words. length: number of generated tokens.
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Interval:
    """A mean and its bootstrap percentile interval."""

    mean: float
    low: float
    high: float


def bootstrap(value_N: Array, *, seed: int = 0, resamples: int = RESAMPLES, confidence: float = CONFIDENCE) -> Interval:
    """Mean of per-item numbers, with its percentile interval over resampled items.

    For a paired comparison, pass the differences.
    """
    count = len(value_N)
    random = np.random.default_rng(seed)
    means: list[Array] = []
    left = resamples
    while left:
        rows = min(left, max(1, CHUNK // count))
        means.append(value_N[random.integers(0, count, (rows, count))].mean(axis=1))
        left -= rows
    low, high = np.quantile(np.concatenate(means), [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean=float(value_N.mean()), low=float(low), high=float(high))


@dataclass(frozen=True, kw_only=True, slots=True)
class Paired:
    """Accuracy before and after steering on the same items.

    gained, lost: number of items that became right, and that became wrong. p: McNemar's exact test, two-sided.
    """

    before: float
    after: float
    difference: Interval
    gained: int
    lost: int
    p: float


def compare(before_N: Array, after_N: Array, *, seed: int = 0) -> Paired:
    """Compare accuracy before and after. Both arrays have 0 or 1 per item, in the same order."""
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
    """Two-sided p-value of McNemar's exact test: the sign test of the items that changed."""
    from scipy.stats import binomtest

    return 1.0 if gained + lost == 0 else float(binomtest(gained, gained + lost, 0.5).pvalue)


def holm(p_by_name: Mapping[str, float]) -> dict[str, float]:
    """p-values corrected by Holm's step-down method, in the order of the input."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for rank, (name, p) in enumerate(sorted(p_by_name.items(), key=lambda entry: entry[1])):
        highest = max(highest, min(1.0, (len(p_by_name) - rank) * p))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_by_name}


def slope(alphas: Array, values: Array) -> float:
    """Least-squares slope of a mean metric against strength. The slope of `margin` is the vector's steerability."""
    centred = alphas - alphas.mean()
    return float(centred @ (values - values.mean()) / (centred @ centred))
