"""The engine's side of an evaluation: questions and conditions in, numbers out.

Full-vocabulary numbers come from vLLM's own `logprobs=-1` in its flat form, without detokenising: exact, and on every
runner. It costs one Python list of the vocabulary per request, about 12 ms and, until it is reduced, 70 bytes per
entry for 49,152 tokens; requests therefore run in batches that fit `MAX_BATCH_BYTES`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import groupby, islice
from typing import TYPE_CHECKING, Any

import numpy as np

from steer_engine.errors import EvaluationError
from steer_engine.evaluate.condition import BASELINE, Condition
from steer_engine.evaluate.encode import Question
from steer_engine.evaluate.metrics import Array, choice_metrics, exact_metrics, normalised, shift_metrics

if TYPE_CHECKING:
    from steer_engine.llm import LLM

BYTES_PER_ENTRY = 70
"""Of vLLM's flat lists: token id, float, rank and their places in four lists."""

MAX_BATCH_BYTES = 1 << 30
"""Of full distributions that wait to be reduced."""

Job = tuple[Question, Condition]
Score = dict[str, float]


def open_engine(model: str, *, dtype: str = "auto", max_model_len: int | None = None, **settings: Any) -> LLM:
    """The one engine of an evaluation: armed to steer and to read, in this process.

    Eager by default: a run of minutes does not earn back the compilation. On processors KV blocks hold 32 tokens, the
    fewest that attention takes there, so that short prompts share them.
    """
    # Read when vLLM is imported. Distributions need not cross a process border then.
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    import torch

    from steer_engine.llm import LLM

    defaults: dict[str, Any] = {"enforce_eager": True, "max_logprobs": -1, "max_num_seqs": 256}
    if not torch.cuda.is_available():
        defaults |= {"block_size": 32, "max_num_seqs": 64}
    if max_model_len is not None:
        defaults["max_model_len"] = max_model_len
    return LLM(model, capture=True, dtype=dtype, **{**defaults, **settings})


class Scorer:
    """Scores (question, condition) pairs on one engine, many in a batch.

    generate: tokens that an exact match may take.
    """

    def __init__(self, llm: LLM, *, generate: int = 32) -> None:
        self._llm = llm
        self._generate = generate
        self._vocabulary = int(llm.model_config.get_vocab_size())

    @property
    def batch(self) -> int:
        """Requests at once."""
        return max(2, MAX_BATCH_BYTES // (BYTES_PER_ENTRY * self._vocabulary))

    def scores(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Score]]:
        """The numbers of every job, the unsteered one of each question first.

        Jobs of one question stand together. Where the unsteered one is not among them it runs as well: KL needs it.
        """
        queue = iter(_with_baselines(jobs))
        baseline_V: Array | None = None
        while batch := list(islice(queue, self.batch)):
            for (job, is_asked), output in zip(batch, self._run([job for job, _ in batch]), strict=True):
                (question, condition), completion = job, output.outputs[0]
                if question.target is not None:
                    score = exact_metrics(completion.text, question.target, len(completion.token_ids))
                else:
                    logprob_V = self._distribution(completion.logprobs)
                    if condition.is_baseline:
                        baseline_V = logprob_V
                    assert baseline_V is not None
                    score = shift_metrics(logprob_V, baseline_V)
                    if question.answer_ids:
                        score |= choice_metrics(logprob_V, question.answer_ids, question.correct)
                if is_asked:
                    yield job, score

    def continuations(self, questions: Sequence[Question], condition: Condition, num_tokens: int) -> list[str]:
        """What the model goes on to write, greedily."""
        outputs = self._generate_all([(question, condition) for question in questions], {"max_tokens": num_tokens})
        return [str(output.outputs[0].text) for output in outputs]

    def _run(self, jobs: Sequence[Job]) -> list[Any]:
        exact = {"max_tokens": self._generate}
        # The greedy token after the prompt, and everything about it.
        full = {"max_tokens": 1, "logprobs": -1, "flat_logprobs": True, "detokenize": False}
        return self._generate_all(jobs, *(exact if question.is_exact else full for question, _ in jobs))

    def _generate_all(self, jobs: Sequence[Job], *settings: dict[str, Any]) -> list[Any]:
        """Outputs in order; one set of settings for all jobs, or one for each."""
        from steer_engine.llm import SamplingParams

        params = [
            SamplingParams(
                temperature=0.0,
                extra_args=None if condition.steering is None else {"steering": condition.steering},
                **setting,
            )
            for (_, condition), setting in zip(
                jobs, settings if len(settings) > 1 else settings * len(jobs), strict=True
            )
        ]
        prompts: Any = [{"prompt_token_ids": list(question.prompt_ids)} for question, _ in jobs]
        outputs: list[Any] = self._llm.generate(prompts, params, use_tqdm=False)
        return outputs

    def _distribution(self, flat: Any) -> Array:
        """vLLM's flat list as log-probabilities by token id."""
        logprob_V = np.full(self._vocabulary, -np.inf)
        logprob_V[np.asarray(flat.token_ids)] = flat.logprobs
        if not np.isfinite(logprob_V.max()) or np.isnan(logprob_V).any():
            raise EvaluationError(
                "The model's next-token distribution is not finite under this steering; try smaller strengths."
            )
        return normalised(logprob_V)


def _with_baselines(jobs: Sequence[Job]) -> Iterator[tuple[Job, bool]]:
    """Jobs, and before those of a question that lack it the unsteered one, marked as not asked for."""
    for _, group in groupby(jobs, key=lambda job: job[0].id):
        own = sorted(group, key=lambda job: not job[1].is_baseline)
        question = own[0][0]
        if not own[0][1].is_baseline and not question.is_exact:
            yield (question, BASELINE), False
        yield from ((job, True) for job in own)
