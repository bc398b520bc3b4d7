"""Run a load on a vLLM engine in this process, step by step, to record the time of each token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from steer_bench.load import Load
from steer_bench.timing import Stopwatch, Timing


def drive(
    engine: Any,
    load: Load,
    prompts: Sequence[list[int]],
    params: Sequence[Any],
    inspect: Callable[[], Any] | None = None,
) -> Timing:
    """Keep `load.concurrency` requests in flight until all are finished.

    inspect: called once, after the first step in which all requests in flight have produced output. Its result is
        `Timing.applied`.
    """
    waiting = list(range(len(prompts)))[::-1]
    in_flight: set[int] = set()
    begun: set[int] = set()
    finished: dict[int, Any] = {}
    applied = {}
    watch = Stopwatch()
    while waiting or in_flight:
        while waiting and len(in_flight) < load.concurrency:
            request = waiting.pop()
            watch.enter(request)
            engine.add_request(str(request), {"prompt_token_ids": prompts[request]}, params[request])
            in_flight.add(request)
        for output in engine.step():
            request = int(output.request_id.split("-")[0])
            watch.tokens(request, len(output.outputs[0].token_ids))
            begun.add(request)
            if output.finished:
                finished[request] = output
                in_flight.discard(request)
        if inspect is not None and in_flight and in_flight <= begun:
            applied, inspect = inspect(), None
    return watch.stop(
        output_tokens=sum(len(output.outputs[0].token_ids) for output in finished.values()),
        prompt_tokens=sum(map(len, prompts)),
        cached_tokens=sum(output.num_cached_tokens or 0 for output in finished.values()),
        prompt_logprobs=[mean_logprob(finished[request]) for request in range(len(prompts))]
        if finished[0].prompt_logprobs
        else [],
        applied=applied,
    )


def mean_logprob(output: Any) -> float:
    """Mean log-probability of the prompt's tokens after the first, in nats."""
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return float(np.mean([step[token].logprob for token, step in pairs]))
