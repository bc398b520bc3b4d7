"""Random traffic on one engine: requests that come while others run, share prefixes, and sometimes leave early."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from helpers.driving import params, prompt_logprobs, sampled, score, tokens
from helpers.engines import RUNNER
from steer_engine import LLM
from steer_engine.llm import probed_numbers

PREFIXES, LONGEST_TAIL = ((0, 34, 70), 50) if RUNNER == "v1" else ((0, 34), 12)
"""Lengths of what prompts have in common (nothing, one block of the cache, two), and of what they have not."""


@dataclass(frozen=True, kw_only=True)
class Request:
    prompt: list[int]
    spec: dict[str, Any] | None
    max_tokens: int
    wait: int
    """Steps between the request before and this one."""
    abort: int | None
    """Tokens of its answer after which it is aborted; None = never."""
    scores_prompt: bool


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What the engine said of one request, up to its end or to its abort."""

    ids: list[int]
    logprobs: np.ndarray
    """float64: of the prompt's tokens except the first, if they were requested, and of the answer's."""
    cached: int
    numbers: dict[str, Any] | None = None
    """Of the request's probes, as in a server's answers; None without any, and of an answer that was aborted."""


def random_batch(rng: np.random.Generator, specs: Sequence[dict[str, Any]], num: int, max_tokens: int) -> list[Request]:
    """`num` requests; one in four is plain, and specs are shared, so that some may share steered blocks."""
    batch = []
    for i in range(num):
        shared = tokens(40_000, PREFIXES[int(rng.integers(len(PREFIXES)))])
        length = 1 + int(rng.integers(max_tokens))
        batch.append(
            Request(
                prompt=[*shared, *tokens(int(rng.integers(50_000, 60_000)), 1 + int(rng.integers(LONGEST_TAIL)))],
                spec=None if i and rng.integers(4) == 0 else specs[i % len(specs)],
                max_tokens=length,
                wait=int(rng.integers(3)),
                abort=int(rng.integers(1, length)) if length > 1 and rng.integers(6) == 0 else None,
                scores_prompt=bool(rng.integers(3) == 0),
            )
        )
    return batch


def unsteered(batch: Sequence[Request]) -> list[Request]:
    return [replace(request, spec=None) for request in batch]


def run_together(llm: LLM, batch: Sequence[Request]) -> list[Answer]:
    """All of `batch` on the engine at once, each added when its time has come."""
    engine = llm.llm_engine
    waiting = list(enumerate(batch))
    answers: dict[int, Answer] = {}
    pause = 0
    while waiting or engine.has_unfinished_requests():
        while waiting and pause == 0:
            number, request = waiting.pop(0)
            wanted = params(
                request.spec, max_tokens=request.max_tokens, prompt_logprobs=0 if request.scores_prompt else None
            )
            prompt: Any = {"prompt_token_ids": request.prompt}
            engine.add_request(str(number), prompt, wanted)
            pause = waiting[0][1].wait if waiting else 0
        pause = max(0, pause - 1)
        for output in engine.step():
            number = int(output.request_id)
            request = batch[number]
            ids, logprobs = sampled(output)
            answered = [*(prompt_logprobs(output) if request.scores_prompt else ()), *logprobs]
            numbers = None
            if output.finished and request.spec is not None and "probes" in request.spec:
                numbers = probed_numbers(output, output.outputs[0], llm._frontend.resolve(request.spec))
            answers[number] = Answer(
                ids=ids, logprobs=np.array(answered), cached=output.num_cached_tokens or 0, numbers=numbers
            )
            if not output.finished and request.abort is not None and len(ids) >= request.abort:
                engine.abort_request([output.request_id])
    return [answers[number] for number in range(len(batch))]


def alone(llm: LLM, request: Request, answer: Answer, spec: dict[str, Any] | None) -> np.ndarray:
    """float64: the logprobs of `answer` again, of one prompt of all its tokens, nobody beside it, the cache cold."""
    llm.llm_engine.reset_prefix_cache()
    whole = [*request.prompt, *answer.ids]
    (logprobs,) = score(llm, [whole], [at_fixed_places(spec, len(request.prompt))])
    return logprobs if request.scores_prompt else logprobs[len(request.prompt) - 1 :]


def at_fixed_places(spec: dict[str, Any] | None, prompt_len: int) -> dict[str, Any] | None:
    """`spec` with scopes that say the same of a longer prompt, one that has the answer in it."""
    if spec is None:
        return None
    return {**spec, "edits": [{**edit, "scope": _span(edit["scope"], prompt_len)} for edit in spec["edits"]]}


def _span(scope: str | dict[str, Any], prompt_len: int) -> str | dict[str, int | None]:
    if isinstance(scope, str):
        spans: dict[str, dict[str, int | None]] = {
            "prompt": {"start": 0, "end": prompt_len},
            "generation": {"start": prompt_len - 1, "end": None},
            "last_prompt_token": {"start": prompt_len - 1, "end": prompt_len},
        }
        return spans.get(scope, scope)
    if scope.get("from") == "generation":
        end = scope.get("end")
        first = prompt_len - 1
        return {"start": first + (scope.get("start") or 0), "end": None if end is None else first + end}
    places = {side: scope.get(side) for side in ("start", "end")}
    return {side: at if at is None or at >= 0 else max(0, prompt_len + at) for side, at in places.items()}
