"""Choosing a condition on the validation split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from steer_engine.evaluate.conditions import Condition
from steer_engine.evaluate.encode import Question
from steer_engine.evaluate.journal import Journal
from steer_engine.evaluate.scorer import Job, Scorer
from steer_engine.evaluate.statistics import Array


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


COMMIT_EVERY = 64
"""Measurements between two writes to disk: what a kill can cost."""

Table = dict[str, Array]
"""Metric -> one number per question, in the order of the questions."""


def sweep(
    scorer: Scorer,
    journal: Journal,
    split: str,
    questions: Sequence[Question],
    conditions: Sequence[Condition],
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[str, Table]:
    """Condition's key -> its numbers. What the journal has is not measured again.

    All conditions of a question stand side by side in a batch, so that they share its prompt in the prefix cache as
    far as their scopes allow.
    """
    distinct = list({condition.key: condition for condition in conditions}.values())
    jobs: list[Job] = [
        (question, condition)
        for question in questions
        for condition in distinct
        if (split, condition.key, question.id) not in journal
    ]
    advance(len(questions) * len(distinct) - len(jobs))
    for count, ((question, condition), score) in enumerate(scorer.scores(jobs), start=1):
        journal.add((split, condition.key, question.id), score)
        advance(1)
        if count % COMMIT_EVERY == 0:
            journal.commit()
    journal.commit()
    return {condition.key: table(journal, split, questions, condition) for condition in distinct}


def table(journal: Journal, split: str, questions: Sequence[Question], condition: Condition) -> Table:
    """The numbers of one condition."""
    rows = [journal[split, condition.key, question.id] for question in questions]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
