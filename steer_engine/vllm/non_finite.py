"""The second line of containment: a steered request whose numbers are not finite ends with an error.

Admission bounds what edits can do (`containment.py`), so this should never happen. If it does, the KV blocks of the
request hold numbers that attention would spread to later owners of the blocks. So they leave the prefix cache at once,
and the workers set those numbers to 0 before the next step.

The worker counts rows of the final hidden states that are not finite (`engine/outputs.py`); the counts travel with the
sampled tokens (`engine/step_report.py`). Wraps `Scheduler.update_from_output`; `scheduler.py` passes
the blocks on to the workers. Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from steer_engine.program import PROGRAM_KEY
from steer_engine.vllm import measured, probed
from steer_engine.vllm.patching import Patch, Symbol, apply
from steer_engine.vllm.runner import report_of

logger = logging.getLogger("steer_engine.requests")

USED = (
    Symbol("vllm.v1.core.kv_cache_manager:KVCacheManager.evict_blocks", ("block_ids",)),
    Symbol("vllm.v1.core.sched.scheduler:Scheduler.finish_requests", ("request_ids", "finished_status")),
    Symbol("vllm.v1.request:RequestStatus"),
    Symbol("vllm.v1.engine:EngineCoreOutput"),
    Symbol("vllm.v1.engine:EngineCoreOutputs"),
)

CLEANED_AT_ONCE = 256
"""KV blocks of one layer that are copied to be cleaned."""

_ENDED = "_steer_ended"
_NUM_ENDED = "_steer_num_ended"
_TO_CLEAN = "_steer_blocks_to_clean"


def num_ended(scheduler: Any) -> int:
    """How many requests have ended because their numbers were not finite."""
    return int(getattr(scheduler, _NUM_ENDED, 0))


def pass_on(scheduler: Any, scheduler_output: Any) -> None:
    """Tell the workers which KV blocks to clean before the step that `scheduler_output` plans."""
    if blocks := getattr(scheduler, _TO_CLEAN, None):
        setattr(scheduler_output, _TO_CLEAN, blocks)
        setattr(scheduler, _TO_CLEAN, [])


def clean_blocks(runner: Any, scheduler_output: Any) -> None:
    """Set what is not finite in the named KV blocks to 0, in all layers of this worker, draft models included."""
    blocks: list[int] = getattr(scheduler_output, _TO_CLEAN, [])
    if not blocks:
        return
    num_blocks = runner.kv_cache_config.num_blocks
    for layer in runner.vllm_config.compilation_config.static_forward_context.values():
        caches = getattr(layer, "kv_cache", ())
        for cache in [caches] if isinstance(caches, torch.Tensor) else caches:
            _clean(cache, blocks, num_blocks)


def _clean(cache: Any, blocks: list[int], num_blocks: int) -> None:
    if not isinstance(cache, torch.Tensor) or cache.numel() == 0:
        return
    # An attention backend may split each block into several of its own, which follow each other.
    parts, rest = divmod(cache.shape[0], num_blocks)
    assert rest == 0, f"a KV cache of shape {list(cache.shape)} does not hold {num_blocks} blocks"
    index = torch.tensor([block * parts + part for block in blocks for part in range(parts)], device=cache.device)
    if cache.element_size() == 1:  # one-byte types have no operation that finds the broken elements
        cache.view(torch.uint8).index_fill_(0, index, 0)
        return
    # Finite elements stay: requests with the same steering may still read those of a shared prefix.
    for some in torch.split(index, CLEANED_AT_ONCE):
        cache.index_copy_(0, some, cache.index_select(0, some).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0))


def _update_from_output(original: Callable[..., Any]) -> Callable[..., Any]:
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        report = report_of(model_runner_output)
        broken = [] if report is None else report.broken
        ended = _end(self, scheduler_output, broken) if broken else []
        numbers = probed.receive(self, report)
        outputs = original(self, scheduler_output, model_runner_output)
        if ended:
            from vllm.v1.engine import EngineCoreOutputs

            for request in ended:
                outputs.setdefault(request.client_index, EngineCoreOutputs()).outputs.append(_error(request))
        measured.attach(self, outputs)
        probed.attach(outputs, numbers)
        return outputs

    return update_from_output


def _end(scheduler: Any, scheduler_output: Any, broken: list[str]) -> list[Any]:
    """End the steered ones of these requests, and mark their KV blocks for cleaning. Returns the ended requests."""
    from vllm.v1.request import RequestStatus

    ended: set[str] = getattr(scheduler, _ENDED, set()) & scheduler_output.num_scheduled_tokens.keys()
    blocks: set[int] = set()
    steered = []
    for name in broken:
        request = scheduler.requests.get(name)
        if request is None:
            # Ended here one step ago, while this step was under way; or gone for another reason, its blocks unknown.
            blocks.update(() if name in ended else _free_blocks(scheduler))
        elif edits := _edits_of(request):
            steered.append(name)
            first = min(start for _, start, *_ in edits)
            blocks.update(_blocks_from(scheduler, request, first) or _free_blocks(scheduler))
            logger.error("Request %s ended with an error: its numbers are not finite. Its edits: %s", name, edits)
    requests: list[Any] = scheduler.finish_requests(steered, RequestStatus.FINISHED_ERROR)
    scheduler.kv_cache_manager.evict_blocks(blocks)
    setattr(scheduler, _ENDED, ended.union(steered))
    setattr(scheduler, _NUM_ENDED, num_ended(scheduler) + len(requests))
    setattr(scheduler, _TO_CLEAN, [*getattr(scheduler, _TO_CLEAN, []), *sorted(blocks)])
    return requests


def _edits_of(request: Any) -> list[Any]:
    """Where a steered request's edits apply, as in `Program.identity`; empty for a plain request."""
    extra_args = request.sampling_params.extra_args if request.sampling_params is not None else None
    program = extra_args.get(PROGRAM_KEY) if extra_args else None
    return [] if program is None else program["identity"]


def _blocks_from(scheduler: Any, request: Any, position: int) -> list[int]:
    """The request's KV blocks that hold `position` or a later one. Earlier ones may be shared with plain requests.

    Empty for a request that was preempted: its blocks are free.
    """
    found = []
    for manager in scheduler.kv_cache_manager.coordinator.single_type_managers:
        held = manager.req_to_blocks.get(request.request_id, ())
        found += [block.block_id for block in held[position // manager.block_size :] if not block.is_null]
    return found


def _free_blocks(scheduler: Any) -> list[int]:
    return [block.block_id for block in scheduler.kv_cache_manager.block_pool.free_block_queue.get_all_free_blocks()]


def _error(request: Any) -> Any:
    from vllm.v1.engine import EngineCoreOutput

    return EngineCoreOutput(
        request_id=request.request_id,
        new_token_ids=[],
        finish_reason=request.get_finished_reason(),
        events=request.take_events(),
        trace_headers=request.trace_headers,
    )


PATCHES = (
    Patch(
        Symbol(
            "vllm.v1.core.sched.scheduler:Scheduler.update_from_output", ("scheduler_output", "model_runner_output")
        ),
        _update_from_output,
    ),
)


def install() -> None:
    apply(PATCHES)
