"""Choosing a condition on the validation split."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from steer_engine.evaluate.condition import Condition
from steer_engine.evaluate.sweep import Table


def choose(
    conditions: Sequence[Condition],
    tables: Mapping[str, Table],
    score: str,
    *,
    neutral: Mapping[str, Table] | None = None,
    max_kl: float | None = None,
) -> Condition | None:
    """The condition with the best mean score; ties go to the larger share of right answers, then to the weaker one.

    max_kl: conditions whose mean KL on neutral texts (`neutral`) is larger don't count. None where it leaves none.
    """

    def rank(condition: Condition) -> tuple[float, float, float]:
        numbers = tables[condition.key]
        share = numbers["share_correct"].mean() if "share_correct" in numbers else 0.0
        return (float(numbers[score].mean()), float(share), -abs(condition.alpha))

    if max_kl is not None:
        assert neutral is not None
        conditions = [condition for condition in conditions if neutral[condition.key]["kl"].mean() <= max_kl]
    return max(conditions, key=rank, default=None)
