"""What was measured for conditions, on its way from the workers into an answer.

When a request with conditions finishes, the engine core asks the workers for its numbers, and sends them along with the
request's last output, as `kv_transfer_params`: an armed engine has no KV connector, which would use that field. Wraps
nothing; `engine_core` and `non_finite` call it. Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from typing import Any

from steer_engine.program import PROGRAM_KEY

KEY = "_steer_measured"

_WATCHED = "_steer_conditional"
"""Attribute of a scheduler: the ids of its requests with conditions."""
_ASK = "_steer_ask"
"""Attribute of a scheduler: asks the workers."""


def watch(core: Any, request: Any) -> None:
    """An engine core accepts a request."""
    program = request.sampling_params.extra_args[PROGRAM_KEY]
    if "conditions" not in program:
        return
    scheduler = core.scheduler
    if not hasattr(scheduler, _WATCHED):
        setattr(scheduler, _WATCHED, set())
        setattr(scheduler, _ASK, lambda ids: core.collective_rpc("steer", args=("measured", ids)))
    getattr(scheduler, _WATCHED).add(request.request_id)


def attach(scheduler: Any, outputs: dict[int, Any]) -> None:
    """After a step: add the numbers to the last outputs of the requests that have finished in it.

    outputs: by client.
    """
    watched: set[str] | None = getattr(scheduler, _WATCHED, None)
    if not watched:
        return
    ended = [
        output
        for of_client in outputs.values()
        for output in of_client.outputs
        if output.finish_reason is not None and output.request_id in watched
    ]
    if not ended:
        return
    replies = getattr(scheduler, _ASK)([output.request_id for output in ended])
    for output, numbers in zip(ended, replies[0].get("numbers", [[]] * len(ended)), strict=True):
        output.kv_transfer_params = {KEY: numbers}
    # Aborted requests have no last output.
    watched &= scheduler.requests.keys()


def take(output: Any) -> list[float]:
    """The numbers that came with an output of vLLM; they are removed from it. Empty if there are none."""
    params = getattr(output, "kv_transfer_params", None)
    if not isinstance(params, dict) or KEY not in params:
        return []
    output.kv_transfer_params = None
    numbers: list[float] = params[KEY]
    return numbers
