"""The scheduler: where the bank is small, a steered request waits until the rows that it needs are free.

Wraps `vllm.v1.core.sched.scheduler.Scheduler.{schedule, _handle_blocked_waiting_request}`. The latter is asked for each
waiting request in each step, beside vLLM's own test of `max_loras`; whom it turns away keeps its place in the queue.
Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from steer_engine.config import SteeringConfig
from steer_engine.program import PROGRAM_KEY, Program, Row
from steer_engine.runtime.bank_queue import BankQueue
from steer_engine.runtime.vllm.patching import Symbol, wrap

_CLASS = "vllm.v1.core.sched.scheduler:Scheduler"
SCHEDULE = Symbol(f"{_CLASS}.schedule")
HANDLE_WAITING = Symbol(f"{_CLASS}._handle_blocked_waiting_request", ("request",))
SYMBOLS = (SCHEDULE, HANDLE_WAITING)

_QUEUE = "_steer_bank_queue"
_ROWS = "_steer_bank_rows"


def hook() -> None:
    wrap(SCHEDULE, _schedule)
    wrap(HANDLE_WAITING, _handle_blocked_waiting_request)


def num_waiting(scheduler: Any) -> int:
    """Steered requests that the engine has taken and that do not run, for want of rows or of anything else."""
    running = set(scheduler.running)
    # Copied first: another thread adds to it.
    requests = list(scheduler.requests.values())
    return sum(1 for request in requests if request not in running and rows_of(request))


def rows_of(request: Any) -> frozenset[Row]:
    """The bank rows of a request, read once from its program."""
    rows: frozenset[Row] | None = getattr(request, _ROWS, None)
    if rows is None:
        params = request.sampling_params
        wire = params.extra_args.get(PROGRAM_KEY) if params is not None and params.extra_args else None
        rows = frozenset() if wire is None else Program.from_wire(wire).bank_rows
        setattr(request, _ROWS, rows)
    return rows


def _queue_of(scheduler: Any) -> BankQueue[Any] | None:
    """None where the engine is not armed, or its bank has room for whatever may run."""
    if not hasattr(scheduler, _QUEUE):
        vllm_config = scheduler.vllm_config
        config = SteeringConfig.from_additional_config(vllm_config.additional_config)
        queue = None
        if config is not None and config.bank_rows is not None:
            queue = BankQueue(config.bank_rows, rows_of, lambda request: time.time() - request.arrival_time)
        setattr(scheduler, _QUEUE, queue)
    found: BankQueue[Any] | None = getattr(scheduler, _QUEUE)
    return found


def _schedule(original: Callable[..., Any]) -> Callable[..., Any]:
    def schedule(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (queue := _queue_of(self)) is not None:
            queue.begin_step()
        return original(self, *args, **kwargs)

    return schedule


def _handle_blocked_waiting_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def _handle_blocked_waiting_request(self: Any, request: Any) -> bool:
        ready: bool = original(self, request)
        if ready and (queue := _queue_of(self)) is not None:
            ready = queue.may_start(request, self.running)
        return ready

    return _handle_blocked_waiting_request
