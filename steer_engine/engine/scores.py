"""What next-token distributions say, reduced where the logits are: numbers leave the worker, no distribution does."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from steer_engine.program import Score

Numbers = dict[str, object]


class Scores:
    """Reduces rows of logits to numbers, and keeps these by request until somebody takes them.

    Distributions of baselines are kept as they are until `take`: later rows are compared with them. Arithmetic is
    float64 on the logits that the model gave.

    Shape suffixes: R rows, V vocabulary, A answers.
    """

    def __init__(self) -> None:
        self._planned: dict[int, Score] = {}
        self._baseline_V: dict[str, torch.Tensor] = {}
        self._numbers: dict[str, Numbers] = {}

    def plan(self, rows: Mapping[int, Score]) -> None:
        """Before a step: what is asked of which row of its logits."""
        self._planned = dict(rows)

    @property
    def rows(self) -> list[int]:
        """Rows of the coming logits that are reduced; the order of `reduce`."""
        return list(self._planned)

    def reduce(self, logits_RV: torch.Tensor) -> None:
        """After the forward pass: the logits of `rows`, in that order."""
        asked, self._planned = list(self._planned.values()), {}
        if not asked:
            return
        logprob_RV = torch.log_softmax(logits_RV.double(), dim=-1)
        for row, score in enumerate(asked):
            if score.key == score.baseline:
                # Of its own: a view would keep the rows of the whole step.
                self._baseline_V[score.key] = logprob_RV[row].clone()
        # A baseline that has not been computed leaves its rows without a number, which `take` tells.
        known = [row for row, score in enumerate(asked) if score.baseline in self._baseline_V]
        if not known:
            return
        asked = [asked[row] for row in known]
        logprob_RV = logprob_RV[known]
        baseline_RV = torch.stack([self._baseline_V[score.baseline] for score in asked])
        kl_R = divergence(baseline_RV, logprob_RV).tolist()
        entropy_R = entropy(logprob_RV).tolist()
        top_R, baseline_top_R = logprob_RV.argmax(-1).tolist(), baseline_RV.argmax(-1).tolist()
        for row, score in enumerate(asked):
            self._numbers[score.key] = {
                "answers": logprob_RV[row, list(score.answers)].tolist(),
                "kl": kl_R[row],
                "entropy": entropy_R[row],
                "top_changed": top_R[row] != baseline_top_R[row],
            }

    def take(self, keys: list[str]) -> list[Numbers | None]:
        """In the order of `keys`, None for what was not reduced; with its baseline it is gone from here afterwards."""
        for key in keys:
            self._baseline_V.pop(key, None)
        return [self._numbers.pop(key, None) for key in keys]


def divergence(baseline_RV: torch.Tensor, logprob_RV: torch.Tensor) -> torch.Tensor:
    """KL(P_0 || P) in nats, `[R]`; a token that P_0 never says adds nothing."""
    terms_RV = baseline_RV.exp() * (baseline_RV - logprob_RV)
    # Rounding alone can push a zero below zero; NaN stays what it is.
    return torch.where(baseline_RV == -torch.inf, 0.0, terms_RV).sum(-1).clamp(min=0.0)


def entropy(logprob_RV: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in nats, `[R]`."""
    terms_RV = logprob_RV.exp() * logprob_RV
    return -torch.where(logprob_RV == -torch.inf, 0.0, terms_RV).sum(-1).clamp(max=0.0)
