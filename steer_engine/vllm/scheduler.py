"""The scheduler and the prefix cache: bank rows decide who may start, steering enters the keys of KV blocks.

Wraps, known for vLLM 0.32 and 0.33:

* `Scheduler.{schedule, _handle_blocked_waiting_request}`: with a small bank, a steered request waits until its rows are
  free. vLLM calls the second for each waiting request in each step, beside its own `max_loras` check; a refused request
  keeps its place in the queue. The first also tells the workers which KV blocks to clean (`non_finite.py`).
* `kv_cache_utils.generate_block_hash_extra_keys`, also where it was imported by name: `program.block_key` is added. KV
  events keep their format: `to_event_extra_keys` publishes the item after the tag, see `program.published_key`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from steer_engine.engine.admission import BankQueue
from steer_engine.program import PROGRAM_KEY, Program, Row, block_key, published_key
from steer_engine.settings import SteeringConfig
from steer_engine.trigger import Trigger, Windows
from steer_engine.vllm import non_finite
from steer_engine.vllm.patching import Patch, Symbol, apply

USED: tuple[Symbol, ...] = ()

_QUEUE = "_steer_bank_queue"
_ROWS = "_steer_bank_rows"
_WINDOWS = "_steer_windows"
"""Attribute of a request: the windows of its triggers over the tokens so far."""


def num_waiting(scheduler: Any) -> int:
    """Steered requests that the engine has accepted and that do not run, for lack of rows or anything else."""
    running = set(scheduler.running)
    # Copied first: another thread adds to it.
    requests = list(scheduler.requests.values())
    return sum(1 for request in requests if request not in running and rows_of(request))


def rows_of(request: Any) -> frozenset[Row]:
    """The bank rows of a request, taken once from its program."""
    rows: frozenset[Row] | None = getattr(request, _ROWS, None)
    if rows is None:
        wire = _program_of(request)
        rows = frozenset() if wire is None else Program.from_wire(wire).bank_rows
        setattr(request, _ROWS, rows)
    return rows


def _program_of(request: Any) -> dict[str, Any] | None:
    """A request's program in wire form; None if it is unsteered."""
    params = request.sampling_params
    return params.extra_args.get(PROGRAM_KEY) if params is not None and params.extra_args else None


def _queue_of(scheduler: Any) -> BankQueue[Any] | None:
    """None where the engine is not armed, or its bank has room for everything that may run."""
    if not hasattr(scheduler, _QUEUE):
        config = SteeringConfig.from_additional_config(scheduler.vllm_config.additional_config)
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
        output = original(self, *args, **kwargs)
        non_finite.pass_on(self, output)
        return output

    return schedule


def _handle_blocked_waiting_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def _handle_blocked_waiting_request(self: Any, request: Any) -> bool:
        ready: bool = original(self, request)
        if ready and (queue := _queue_of(self)) is not None:
            ready = queue.may_start(request, self.running)
        return ready

    return _handle_blocked_waiting_request


def _windows_of(request: Any, program: dict[str, Any], end: int) -> list[Windows]:
    """The windows of the program's triggers over the request's tokens, up to `end` at least."""
    if "triggers" not in program:
        return []
    windows: list[Windows] | None = getattr(request, _WINDOWS, None)
    if windows is None:
        windows = [Windows(Trigger.from_wire(trigger)) for trigger in program["triggers"]]
        setattr(request, _WINDOWS, windows)
    for each in windows:
        if each.num_tokens < end:
            each.extend(request.all_token_ids[each.num_tokens :])
    return windows


def _with_steering(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx, *args, **kwargs)
        if (program := _program_of(request)) is not None:
            key = block_key(program, _windows_of(request, program, end_token_idx), start_token_idx, end_token_idx)
            if key is not None:
                keys = (*(keys or ()), published_key(key))
        return keys, next_mm_idx

    return generate_block_hash_extra_keys


_SCHEDULER = "vllm.v1.core.sched.scheduler:Scheduler"
_KEYS = "generate_block_hash_extra_keys"
PATCHES = (
    Patch(Symbol(f"{_SCHEDULER}.schedule"), _schedule),
    Patch(Symbol(f"{_SCHEDULER}._handle_blocked_waiting_request", ("request",)), _handle_blocked_waiting_request),
    Patch(
        Symbol(f"vllm.v1.core.kv_cache_utils:{_KEYS}", ("request", "start_token_idx", "end_token_idx")), _with_steering
    ),
    Patch(Symbol(f"vllm.v1.core.block_pool:{_KEYS}"), _with_steering),
    Patch(Symbol(f"vllm.v1.simple_kv_offload.manager:{_KEYS}"), _with_steering),
)


def install() -> None:
    apply(PATCHES)
