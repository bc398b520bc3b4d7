"""Numbers about one next-token distribution, in float64. Pure NumPy, no engine.

Shape suffix: V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

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


def normalised(logprob_V: npt.ArrayLike) -> Array:
    """Log-probabilities that sum to one in float64, from ones (or logits) in any dtype. `[V]`"""
    values_V = np.asarray(logprob_V, dtype=np.float64)
    shifted_V = values_V - values_V.max()
    result_V: Array = shifted_V - np.log(np.exp(shifted_V).sum())
    return result_V


def choice_metrics(logprob_V: Array, answer_ids: Sequence[int], correct: int) -> dict[str, float]:
    """What a distribution says about answers, given the token that decides for each.

    accuracy: 1 if the right answer is strictly more probable than each other one, else 0.
    logp_correct, logp_incorrect: log-probability (nats, whole vocabulary) of the right answer, and of all others
        together. mass_*: the same as probabilities.
    margin: log-probability of the right answer minus that of the best other one, a difference of logits.
    share_correct, share_incorrect: the same with the softmax restricted to the answers; they sum to 1.
    """
    answer_A = logprob_V[list(answer_ids)]
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


def shift_metrics(logprob_V: Array, baseline_V: Array) -> dict[str, float]:
    """How a distribution differs from the unsteered one.

    kl: KL(P_0 || P_alpha) in nats over the whole vocabulary. entropy: of P_alpha, in bits.
    top_changed: 1 if the most probable token is another one, else 0.
    """
    return {
        "kl": kl_divergence(baseline_V, logprob_V),
        "entropy": entropy_bits(logprob_V),
        "top_changed": float(int(logprob_V.argmax()) != int(baseline_V.argmax())),
    }


def kl_divergence(baseline_V: Array, logprob_V: Array) -> float:
    """KL(P_0 || P) in nats; a token that P_0 never says adds nothing."""
    said = baseline_V > -np.inf
    terms = np.exp(baseline_V[said]) * (baseline_V[said] - logprob_V[said])
    return max(0.0, float(terms.sum()))  # rounding alone can push a zero below zero


def entropy_bits(logprob_V: Array) -> float:
    """Shannon entropy in bits."""
    said_V = logprob_V[logprob_V > -np.inf]
    return max(0.0, float(-(np.exp(said_V) * said_V).sum() / np.log(2.0)))


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
