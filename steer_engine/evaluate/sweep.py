"""Measures all conditions on one split, and chooses the best condition."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from steer_engine.evaluate.conditions import Condition
from steer_engine.evaluate.encode import Question
from steer_engine.evaluate.journal import Journal
from steer_engine.evaluate.scorer import Job, Scorer
from steer_engine.evaluate.statistics import Array

COMMIT_EVERY = 64
"""Measurements between two writes to disk. A killed run loses at most this many."""

Table = dict[str, Array]
"""Metric -> array of shape `[questions]`, in the order of the questions."""


def sweep(
    scorer: Scorer,
    journal: Journal,
    split: str,
    questions: Sequence[Question],
    conditions: Sequence[Condition],
    advance: Callable[[int], None] = lambda steps: None,
) -> dict[str, Table]:
    """Measure conditions on questions, except those that the journal has.

    Returns: key of each condition -> its table.

    All conditions of a question are adjacent in a batch. They share its prompt in the prefix cache as far as their
    scopes allow.
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
    return {condition.key: _table(journal, split, questions, condition) for condition in distinct}


def choose(
    conditions: Sequence[Condition],
    tables: Mapping[str, Table],
    score: str,
    *,
    neutral: Mapping[str, Table] | None = None,
    max_kl: float | None = None,
) -> Condition | None:
    """The condition with the best mean score; None if `max_kl` excludes all.

    Ties go to the larger share of right answers, then to the smaller strength.
    max_kl: excludes conditions with a larger mean KL on neutral texts (`neutral`), in nats.
    """

    def rank(condition: Condition) -> tuple[float, float, float]:
        numbers = tables[condition.key]
        share = numbers["share_correct"].mean() if "share_correct" in numbers else 0.0
        return (float(numbers[score].mean()), float(share), -abs(condition.alpha))

    if max_kl is not None:
        assert neutral is not None
        conditions = [condition for condition in conditions if neutral[condition.key]["kl"].mean() <= max_kl]
    return max(conditions, key=rank, default=None)


def _table(journal: Journal, split: str, questions: Sequence[Question], condition: Condition) -> Table:
    """The table of one condition, from the journal."""
    rows = [journal[split, condition.key, question.id] for question in questions]
    return {name: np.array([row[name] for row in rows]) for name in rows[0]}
