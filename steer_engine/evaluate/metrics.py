"""Metrics of an answer, from what the engine says of its next-token distribution. Pure NumPy, no engine.

Shape suffix: A answers.
"""

from __future__ import annotations

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
