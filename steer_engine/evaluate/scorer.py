"""The engine's side of an evaluation: questions and conditions in, numbers out.

Distributions are reduced where the logits are (`LLM.score`); only numbers come back.
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
from steer_engine.evaluate.statistics import choice_metrics, exact_metrics, shift_metrics

if TYPE_CHECKING:
    from steer_engine.llm import LLM, Numbers


BATCH = 512
"""Requests that are given to the engine in one go; a question's conditions go together, as the cache likes it."""

Job = tuple[Question, Condition]
Score = dict[str, float]


def open_engine(model: str, *, dtype: str = "auto", max_model_len: int | None = None, **settings: Any) -> LLM:
    """The one engine of an evaluation: armed to steer and to read, in this process.

    Eager by default: a run of minutes does not earn back the compilation. On processors KV blocks hold 32 tokens, the
    fewest that attention takes there, so that short prompts share them.
    """
    # Read when vLLM is imported. What is read for a vector need not cross a process border then.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import torch

    from steer_engine.llm import LLM

    defaults: dict[str, Any] = {"enforce_eager": True, "max_num_seqs": 256}
    if not torch.cuda.is_available():
        defaults |= {"block_size": 32, "max_num_seqs": 64}
    if max_model_len is not None:
        defaults["max_model_len"] = max_model_len
    return LLM(model, capture=True, dtype=dtype, **{**defaults, **settings})


class Scorer:
    """Scores (question, condition) pairs on one engine, many in a batch.

    generate: tokens that an exact match may take. batch: requests that are given to the engine in one go.
    """

    def __init__(self, llm: LLM, *, generate: int = 32, batch: int = BATCH) -> None:
        self._llm = llm
        self._generate = generate
        self._batch = batch

    def scores(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Score]]:
        """The numbers of every job, the unsteered one of each question first.

        Jobs of one question stand together. Where the unsteered one is not among them it runs as well: KL needs it.
        """
        for is_exact, alike in groupby(jobs, key=lambda job: job[0].is_exact):
            score = self._exact if is_exact else self._shifts
            for batch in _batches(alike, self._batch):
                yield from zip(batch, score(batch), strict=True)

    def _exact(self, jobs: Sequence[Job]) -> list[Score]:
        outputs = self._generate_all(jobs, self._generate)
        scores = []
        for (question, _), output in zip(jobs, outputs, strict=True):
            completion = output.outputs[0]
            scores.append(exact_metrics(completion.text, str(question.target), len(completion.token_ids)))
        return scores

    def _shifts(self, jobs: Sequence[Job]) -> list[Score]:
        asked: list[Job] = []
        baselines: list[int] = []
        place: dict[str, int] = {}
        """Where each question's unsteered job stands."""
        for question, condition in jobs:
            if question.id not in place:
                place[question.id] = len(asked)
                if not condition.is_baseline:
                    asked.append((question, BASELINE))
                    baselines.append(place[question.id])
            asked.append((question, condition))
            baselines.append(place[question.id])
        found = self._llm.score(
            [list(question.prompt_ids) for question, _ in asked],
            steering=[condition.steering for _, condition in asked],
            baselines=baselines,
            answers=[question.answer_ids for question, _ in asked],
        )
        wanted = iter(zip(asked, found, strict=True))
        # Both in the same order; what was not asked for is passed over.
        return [next(_metrics(job, numbers) for job, numbers in wanted if job == one) for one in jobs]

    def continuations(self, questions: Sequence[Question], condition: Condition, num_tokens: int) -> list[str]:
        """What the model goes on to write, greedily."""
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


def _metrics(job: Job, numbers: Numbers) -> Score:
    if not np.isfinite([numbers.kl, numbers.entropy]).all():
        raise EvaluationError(
            "The model's next-token distribution is not finite under this steering; try smaller strengths."
        )
    question, _ = job
    score = shift_metrics(numbers.kl, numbers.entropy, numbers.top_changed)
    return score | (choice_metrics(numbers.answers, question.correct) if question.answer_ids else {})


def _batches(jobs: Iterable[Job], size: int) -> Iterator[list[Job]]:
    """All jobs of a question in one batch, its unsteered one first; as many questions as fit, at least one."""
    batch: list[Job] = []
    for _, group in groupby(jobs, key=lambda job: job[0].id):
        own = sorted(group, key=lambda job: not job[1].is_baseline)
        if batch and len(batch) + len(own) > size:
            yield batch
            batch = []
        batch += own
    if batch:
        yield batch
