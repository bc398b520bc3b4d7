"""What was measured for conditions, on its way from the workers into an answer.

When a request with conditions has its first token, the engine core asks the workers for its numbers, and sends them
with every output of the request, as `kv_transfer_params`: an armed engine has no KV connector, which would use that
field. With every output, because vLLM merges outputs that wait, and because an answer that ends at a stop string is
ended by the API process, after any output. Wraps nothing; `engine_core` and `non_finite` call it. Known for vLLM 0.32
and 0.33.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from steer_engine.program import PROGRAM_KEY

KEY = "_steer_measured"

_WATCH = "_steer_watch"
"""Attribute of a scheduler."""

FEW = 256
"""So many requests that have left may be remembered."""
ARRIVAL_SECONDS = 600.0
"""A request that the scheduler does not have after this time has left; a younger one may not have arrived."""


@dataclass
class _Watch:
    """The requests with conditions of an engine core."""

    core: Any
    since: dict[str, float] = field(default_factory=dict)
    """By request id, when the core accepted it."""
    numbers: dict[str, list[float]] = field(default_factory=dict)
    """Of those that have a first token."""


def watch(core: Any, request: Any) -> None:
    """An engine core accepts a request."""
    if "conditions" not in request.sampling_params.extra_args[PROGRAM_KEY]:
        return
    if not hasattr(core.scheduler, _WATCH):
        setattr(core.scheduler, _WATCH, _Watch(core))
    getattr(core.scheduler, _WATCH).since[request.request_id] = time.monotonic()


def attach(scheduler: Any, outputs: dict[int, Any]) -> None:
    """After a step: add the numbers to the outputs of requests with conditions. outputs: by client."""
    watched: _Watch | None = getattr(scheduler, _WATCH, None)
    if watched is None or not watched.since:
        return
    theirs = [
        output for of_client in outputs.values() for output in of_client.outputs if output.request_id in watched.since
    ]
    new = [output.request_id for output in theirs if output.request_id not in watched.numbers]
    if new:
        replies = watched.core.collective_rpc("steer", args=("measured", new))
        watched.numbers.update(zip(new, replies[0].get("numbers", [[]] * len(new)), strict=True))
    for output in theirs:
        output.kv_transfer_params = {KEY: watched.numbers[output.request_id]}
        if output.finish_reason is not None:
            watched.since.pop(output.request_id)
            watched.numbers.pop(output.request_id)
    if len(watched.since) > len(scheduler.requests) + FEW:
        _forget_aborted(watched, scheduler)


def _forget_aborted(watched: _Watch, scheduler: Any) -> None:
    """An aborted request has no last output."""
    latest = time.monotonic() - ARRIVAL_SECONDS
    for name, since in list(watched.since.items()):  # another thread adds to it
        if name not in scheduler.requests and (name in watched.numbers or since < latest):
            watched.since.pop(name, None)
            watched.numbers.pop(name, None)


def take(output: Any) -> list[float]:
    """The numbers that came with an output of vLLM; they are removed from it. Empty if there are none."""
    params = getattr(output, "kv_transfer_params", None)
    if not isinstance(params, dict) or KEY not in params:
        return []
    output.kv_transfer_params = None
    numbers: list[float] = params[KEY]
    return numbers
