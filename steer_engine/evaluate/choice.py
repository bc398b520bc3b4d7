"""Choosing a condition on the validation split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from steer_engine.evaluate.condition import Condition
from steer_engine.evaluate.sweep import Table


def choose(
    conditions: Sequence[Condition], tables: Mapping[str, Table], score: str, *, max_kl: float | None = None
) -> Condition | None:
    """The condition with the best mean score; ties go to the larger share of right answers, then to the weaker one.

    None where `max_kl` leaves none.
    """
    allowed = [
        condition
        for condition in conditions
        if max_kl is None or "kl" not in tables[condition.key] or tables[condition.key]["kl"].mean() <= max_kl
    ]

    def rank(condition: Condition) -> tuple[float, float, float]:
        numbers = tables[condition.key]
        share = numbers["share_correct"].mean() if "share_correct" in numbers else 0.0
        return (float(numbers[score].mean()), float(share), -abs(condition.alpha))

    return max(allowed, key=rank, default=None)
