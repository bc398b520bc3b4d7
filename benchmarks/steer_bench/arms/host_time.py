"""Host time of Steer Engine's Python code per step and per request, for an engine on the V1 runner.

Wraps methods of the adapter and the frontend instances with timers for one run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np

from steer_bench.load import Load

Spans = dict[str, list[float]]


def host_time(arm: Any, load: Load) -> dict[str, Any]:
    """Median microseconds per step (decode-only steps and other steps) and per request."""
    runner = arm.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    adapter, runtime = runner._steer_adapter, runner._steer_adapter.runtime
    frontend = arm.engine.input_processor.steering
    while runtime.counts_calls:  # only in an engine's first steps
        arm.run(load)
    spans: Spans = {}
    steps: list[tuple[bool, float]] = []
    route = adapter.route

    def timed_route(num_scheduled_tokens: np.ndarray) -> None:
        start = time.perf_counter()
        route(num_scheduled_tokens)
        took = time.perf_counter() - start
        # Add the time of `follow` in the same step.
        took += spans["follow"].pop() if spans.get("follow") else 0.0
        steps.append((int(num_scheduled_tokens.max()) == 1, took))

    with ExitStack() as stack:
        stack.enter_context(_replaced(adapter, "route", timed_route))
        for owner, method, name in (
            (adapter, "follow", "follow"),
            (runtime, "admit", "admit"),
            (runtime, "edit", "edit"),
            (frontend, "resolve", "resolve"),
            (frontend, "compile", "compile"),
        ):
            stack.enter_context(_replaced(owner, method, _timed(getattr(owner, method), spans.setdefault(name, []))))
        arm.run(load)
    decoding = [took for decodes, took in steps if decodes]
    prefill = [took for decodes, took in steps if not decodes]
    return {
        "requests": load.num_requests,
        "steps": len(steps),
        "decode_step_us": _us(decoding),
        "prefill_step_us": _us(prefill),
        "edit_per_site_us": _us(spans["edit"]),
        "resolve_per_request_us": _us(spans["resolve"]),
        "compile_per_request_us": _us(spans["compile"]),
        "admit_per_request_us": _us(spans["admit"]),
    }


def _us(seconds: list[float]) -> float | None:
    return 1e6 * float(np.median(seconds)) if seconds else None


def _timed(method: Callable[..., Any], into: list[float]) -> Callable[..., Any]:
    def timed(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return method(*args, **kwargs)
        finally:
            into.append(time.perf_counter() - start)

    return timed


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    setattr(owner, name, value)
    try:
        yield
    finally:
        delattr(owner, name)
