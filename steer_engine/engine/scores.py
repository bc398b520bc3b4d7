"""Numbers about next-token distributions, computed in the worker that has the logits.

Only these numbers leave the worker, never a distribution. Arithmetic is float64.

Shape suffixes: R rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from steer_engine.program import Score

Numbers = dict[str, object]


class Scores:
    """Reduces rows of logits to numbers, and stores these by key until they are taken.

    The distribution of a baseline is stored until `take`, because later rows are compared with it.
    """

    def __init__(self) -> None:
        self._planned: dict[int, Score] = {}
        self._baseline_V: dict[str, torch.Tensor] = {}
        self._numbers: dict[str, Numbers] = {}

    def plan(self, rows: Mapping[int, Score]) -> None:
        """Before a step: row of its logits -> the score to compute from it."""
        self._planned = dict(rows)

    @property
    def rows(self) -> list[int]:
        """The rows of the coming logits to pass to `reduce`, in this order."""
        return list(self._planned)

    def reduce(self, logits_RV: torch.Tensor) -> None:
        """After the forward pass: compute the planned scores.

        logits_RV: the logits of `rows`, in that order.
        """
        requested, self._planned = list(self._planned.values()), {}
        if not requested:
            return
        logprob_RV = torch.log_softmax(logits_RV.double(), dim=-1)
        for row, score in enumerate(requested):
            if score.key == score.baseline:
                # A copy: a view would keep all rows of the step in memory.
                self._baseline_V[score.key] = logprob_RV[row].clone()
        # Rows whose baseline has not been computed get no numbers; `take` returns None for them.
        known = [row for row, score in enumerate(requested) if score.baseline in self._baseline_V]
        if not known:
            return
        requested = [requested[row] for row in known]
        logprob_RV = logprob_RV[known]
        baseline_RV = torch.stack([self._baseline_V[score.baseline] for score in requested])
        kl_R = divergence(baseline_RV, logprob_RV).tolist()
        entropy_R = entropy(logprob_RV).tolist()
        top_R, baseline_top_R = logprob_RV.argmax(-1).tolist(), baseline_RV.argmax(-1).tolist()
        for row, score in enumerate(requested):
            self._numbers[score.key] = {
                "answers": logprob_RV[row, list(score.answers)].tolist(),
                "kl": kl_R[row],
                "entropy": entropy_R[row],
                "top_changed": top_R[row] != baseline_top_R[row],
            }

    def take(self, keys: list[str]) -> list[Numbers | None]:
        """Remove and return the numbers of `keys`, in order; None for what was not computed. Removes baselines too."""
        for key in keys:
            self._baseline_V.pop(key, None)
        return [self._numbers.pop(key, None) for key in keys]


def divergence(baseline_RV: torch.Tensor, logprob_RV: torch.Tensor) -> torch.Tensor:
    """KL(baseline || distribution) in nats, `[R]`. A token with baseline probability 0 adds nothing.

    Both arguments are log-probabilities.
    """
    terms_RV = baseline_RV.exp() * (baseline_RV - logprob_RV)
    # Rounding can make a zero negative. The clamp leaves NaN as it is.
    return torch.where(baseline_RV == -torch.inf, 0.0, terms_RV).sum(-1).clamp(min=0.0)


def entropy(logprob_RV: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in nats, `[R]`, of log-probabilities."""
    terms_RV = logprob_RV.exp() * logprob_RV
    return -torch.where(logprob_RV == -torch.inf, 0.0, terms_RV).sum(-1).clamp(max=0.0)
