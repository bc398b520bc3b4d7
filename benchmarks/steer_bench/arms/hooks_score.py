"""Scores (item, strength) pairs on a Hugging Face model with hooks, in batches.

Shape suffixes: B rows, A answers, L blocks, D hidden size, V vocabulary.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any


def score(
    arm: Any, *, questions: Sequence[dict[str, Any]], alphas: Sequence[float], scope: str, batch_size: int
) -> dict[str, Any]:
    """Returns `seconds`, and `scores` by question and strength: log-probabilities of the right and the wrong answer, KL
    divergence from strength 0, entropy (nats).

    questions: `prompt_ids` and `answer_ids` (right, wrong).
    alphas: strengths of vector 0 at every block. The first must be 0.
    scope: "all" = all positions; "generation" = only the last token of the prompt.

    Rows of a question are adjacent and questions are sorted by length, to minimize padding. Only the last position
    goes through the head.
    """
    import torch

    if alphas[0] != 0.0:
        raise ValueError(f"The first strength must be 0 (the baseline of KL), got {alphas[0]}.")
    order = sorted(range(len(questions)), key=lambda number: len(questions[number]["prompt_ids"]))
    jobs = [(number, place) for number in order for place in range(len(alphas))]
    found: list[list[Any]] = [[None] * len(alphas) for _ in questions]
    start = time.perf_counter()
    arm.last_only = scope == "generation"
    baseline_V: Any = None
    with torch.inference_mode():
        for at in range(0, len(jobs), batch_size):
            batch = jobs[at : at + batch_size]
            alpha_B = torch.tensor([alphas[place] for _, place in batch], device=arm.device)
            arm.steer_LBD = (arm.vectors_VLD[0][:, None] * alpha_B[:, None]).to(arm.dtype)
            inputs = arm.padded([questions[number]["prompt_ids"] for number, _ in batch])
            logits_BV = arm.model(**inputs, use_cache=False, logits_to_keep=1).logits[:, -1]
            logprob_BV = logits_BV.float().log_softmax(-1)
            answers_BA = torch.tensor([questions[number]["answer_ids"] for number, _ in batch], device=arm.device)
            answer_BA = logprob_BV.gather(1, answers_BA)
            baselines = []
            for row, (_, place) in enumerate(batch):
                if place == 0:
                    baseline_V = logprob_BV[row]
                baselines.append(baseline_V)
            base_BV = torch.stack(baselines)
            kl_B = (base_BV.exp() * (base_BV - logprob_BV)).sum(-1)
            entropy_B = -(logprob_BV.exp() * logprob_BV).sum(-1)
            numbers = torch.cat([answer_BA, kl_B[:, None], entropy_B[:, None]], dim=1).tolist()
            for (number, place), row_numbers in zip(batch, numbers, strict=True):
                found[number][place] = row_numbers
    arm.steer_LBD, arm.last_only = None, False
    return {"seconds": time.perf_counter() - start, "scores": found}
