"""Steer Engine scoring (item, strength) pairs with the engine and `Scorer` of `steer-engine eval`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import numpy as np

from steer_bench.arms.stock import engine_facts
from steer_bench.load import vector
from steer_bench.settings import Settings

ENVIRONMENT: dict[str, str] = {}


def load(settings: Settings) -> Scoring:
    from steer_engine.evaluate.scorer import open_engine

    llm = open_engine(
        settings.model,
        dtype=settings.dtype,
        max_model_len=settings.max_model_len,
        gpu_memory_utilization=settings.memory,
        seed=0,
    )
    return Scoring(llm)


class Scoring:
    """An evaluation engine in this process. Its only vector is number 0, at every block."""

    def __init__(self, llm: Any) -> None:
        from steer_engine import ControlVector
        from steer_engine.evaluate.scorer import Scorer

        self.llm = llm
        self.scorer = Scorer(llm)
        made = ControlVector(directions=dict(enumerate(vector(0, llm.num_blocks, llm.hidden_size))))
        llm.vectors.add("v0", made)
        self.digest = made.digest

    def describe(self) -> dict[str, Any]:
        import torch

        import steer_engine

        return {
            "steer_engine": steer_engine.__version__,
            "num_blocks": self.llm.num_blocks,
            "armed_blocks": list(self.llm.armed_blocks),
            "threads": torch.get_num_threads(),
            **engine_facts(self.llm.llm_engine),
        }

    def command(self, what: str, **arguments: Any) -> Any:
        if what == "score":
            return self._score(**arguments)
        raise ValueError(f"This arm has no command {what!r}.")

    def _score(self, questions: Sequence[dict[str, Any]], alphas: Sequence[float], scope: str) -> dict[str, Any]:
        """Same result as `hooks_score.score`. The prefix cache is empty at the start."""
        from steer_engine.evaluate.conditions import Condition
        from steer_engine.evaluate.encode import Question

        encoded = [
            Question(id=str(number), prompt_ids=tuple(each["prompt_ids"]), answer_ids=tuple(each["answer_ids"]))
            for number, each in enumerate(questions)
        ]
        conditions = [Condition(vector="v0", digest=self.digest, alpha=alpha, scope=scope) for alpha in alphas]
        place = {condition.key: number for number, condition in enumerate(conditions)}
        found: list[list[Any]] = [[None] * len(alphas) for _ in questions]
        assert self.llm.llm_engine.reset_prefix_cache()
        start = time.perf_counter()
        jobs = [(question, condition) for question in encoded for condition in conditions]
        for (question, condition), score in self.scorer.scores(jobs):
            numbers = [score["logp_correct"], score["logp_incorrect"], score["kl"], score["entropy"] * np.log(2.0)]
            found[int(question.id)][place[condition.key]] = [float(number) for number in numbers]
        return {"seconds": time.perf_counter() - start, "scores": found}
