"""Runs questions under conditions on one engine, and returns their metrics.

The worker reduces each distribution to a few numbers (`LLM.score`); logits never leave it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any

import numpy as np

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.conditions import BASELINE, Condition
from steer_engine.evaluate.encode import Question
from steer_engine.evaluate.statistics import ANSWER_KEY, choice_metrics, exact_metrics, shift_metrics
from steer_engine.settings import SteeringConfig

if TYPE_CHECKING:
    from steer_engine.llm import LLM, Numbers
    from steer_engine.vectors.control_vector import ControlVector


BATCH = 512
"""Requests per call of the engine. All conditions of a question are in one batch, to share the prefix cache."""

Job = tuple[Question, Condition]
Score = dict[str, float]


def open_engine(
    model: str,
    *,
    vectors: Iterable[ControlVector] = (),
    dtype: str = "auto",
    max_model_len: int | None = None,
    **settings: Any,
) -> LLM:
    """Start the engine of an evaluation in this process, with steering and capture enabled.

    It runs eagerly, because a run of a few minutes is too short to repay compilation. On a CPU, KV-cache blocks have
    32 tokens, the smallest size that CPU attention supports, so that short prompts share blocks.

    vectors: the sites at which they apply are armed.
    """
    # vLLM reads this when it is imported. In one process, captured rows need no copy between processes.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import torch

    from steer_engine.llm import LLM

    sites = tuple({vector.metadata.site for vector in vectors})
    defaults: dict[str, Any] = {
        "enforce_eager": True, "max_num_seqs": 256, "steering": SteeringConfig(sites=sites)
    }  # fmt: skip
    if not torch.cuda.is_available():
        defaults |= {"block_size": 32, "max_num_seqs": 64}
    if max_model_len is not None:
        defaults["max_model_len"] = max_model_len
    return LLM(model, capture=True, dtype=dtype, **{**defaults, **settings})


class Scorer:
    """Scores (question, condition) pairs on one engine, in large batches.

    generate: tokens to generate for an exact match. batch: requests per call of the engine.
    keep_answers: also return the log-probability of each answer of a choice (`answer_0`, `answer_1`, ...).
    """

    def __init__(self, llm: LLM, *, generate: int = 32, batch: int = BATCH, keep_answers: bool = False) -> None:
        self._llm = llm
        self._keep_answers = keep_answers
        self._generate = generate
        self._batch = batch

    def scores(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Score]]:
        """The metrics of every job. The unsteered job of each question comes first.

        Jobs of one question must be adjacent. If the unsteered one is missing, it runs too, because KL needs it.

        Raises:
            EvaluationError: a steered distribution is not finite.
        """
        for is_exact, of_one_kind in groupby(jobs, key=lambda job: job[0].is_exact):
            score = self._exact if is_exact else self._shifts
            for batch in _batches(of_one_kind, self._batch):
                yield from zip(batch, score(batch), strict=True)

    def _exact(self, jobs: Sequence[Job]) -> list[Score]:
        outputs = self._generate_all(jobs, self._generate)
        scores = []
        for (question, _), output in zip(jobs, outputs, strict=True):
            completion = output.outputs[0]
            scores.append(exact_metrics(completion.text, str(question.target), len(completion.token_ids)))
        return scores

    def _shifts(self, jobs: Sequence[Job]) -> list[Score]:
        submitted: list[Job] = []
        baselines: list[int] = []  # for each submitted job, the index of its question's unsteered job
        baseline_of: dict[str, int] = {}
        for question, condition in jobs:
            if question.id not in baseline_of:
                baseline_of[question.id] = len(submitted)
                if not condition.is_baseline:
                    submitted.append((question, BASELINE))
                    baselines.append(baseline_of[question.id])
            submitted.append((question, condition))
            baselines.append(baseline_of[question.id])
        scored = self._llm.score(
            [list(question.prompt_ids) for question, _ in submitted],
            steering=[condition.steering for _, condition in submitted],
            baselines=baselines,
            answers=[question.answer_ids for question, _ in submitted],
        )
        results = iter(zip(submitted, scored, strict=True))
        # Both lists have the same order; this skips the unsteered jobs that were added above.
        return [next(self._metrics(job, numbers) for job, numbers in results if job == requested) for requested in jobs]

    def _metrics(self, job: Job, numbers: Numbers) -> Score:
        if not np.isfinite([numbers.kl, numbers.entropy]).all():
            raise EvaluationError(
                "The model's next-token distribution is not finite with this steering; try smaller strengths."
            )
        question, _ = job
        score = shift_metrics(numbers.kl, numbers.entropy, numbers.top_changed)
        if question.answer_ids:
            score |= choice_metrics(numbers.answers, question.correct)
            if self._keep_answers:
                score |= {ANSWER_KEY.format(i): value for i, value in enumerate(numbers.answers)}
        return score

    def continuations(self, questions: Sequence[Question], condition: Condition, num_tokens: int) -> list[str]:
        """Greedy continuations of the questions, `num_tokens` long."""
        outputs = self._generate_all([(question, condition) for question in questions], num_tokens)
        return [str(output.outputs[0].text) for output in outputs]

    def _generate_all(self, jobs: Sequence[Job], num_tokens: int) -> list[Any]:
        """Greedy outputs in order."""
        from steer_engine.llm import SamplingParams

        params = [
            SamplingParams(
                temperature=0.0,
                max_tokens=num_tokens,
                extra_args=None if condition.steering is None else {"steering": condition.steering},
            )
            for _, condition in jobs
        ]
        prompts: Any = [{"prompt_token_ids": list(question.prompt_ids)} for question, _ in jobs]
        outputs: list[Any] = self._llm.generate(prompts, params, use_tqdm=False)
        return outputs


def _batches(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """Batches of whole questions, each at most `size` jobs unless one question has more. Unsteered jobs come first."""
    batch: list[Job] = []
    for _, group in groupby(jobs, key=lambda job: job[0].id):
        own = sorted(group, key=lambda job: not job[1].is_baseline)
        if batch and len(batch) + len(own) > size:
            yield batch
            batch = []
        batch += own
    if batch:
        yield batch
