"""V1 model runner: a request owns a slot while it is in the input batch; each step is routed after `_prepare_inputs`.

Wraps `GPUModelRunner.{_update_states, _prepare_inputs, _dummy_run, execute_model, sample_tokens}` of
`vllm.v1.worker.gpu_model_runner`; the CPU class inherits them. Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from steer_engine.engine.runtime import EngineRuntime
from steer_engine.program import Score
from steer_engine.vllm.non_finite import clean_blocks
from steer_engine.vllm.patching import Patch, Symbol, apply
from steer_engine.vllm.runner import ADAPTER, Computed, RunnerAdapter, idle_first, reporting, through_stages

USED: tuple[Symbol, ...] = ()


class V1Adapter(RunnerAdapter):
    """Preempted requests give up their slot; they get one again when they return. Requests that a step skips leave the
    batch too, but they keep their slot, and with it the state of their triggers and conditions.
    """

    def __init__(self, runner: Any, runtime: EngineRuntime) -> None:
        super().__init__(runner, runtime)
        self._slot_of: dict[str, int] = {}
        """All requests of the batch; slot 0 for unsteered ones."""
        self._scored: dict[str, Score] = {}
        self._free_slots = list(range(runtime.max_requests, 0, -1))
        # Written inside `synchronize_input_prep`: the previous step's copy has finished by then.
        self._idx_mapping_B = runner._make_buffer(runtime.max_requests, dtype=torch.int32)
        self._parked: dict[str, torch.Generator] = {}
        """Random generators of requests whose prompt is incomplete in this step (CPU only)."""
        self._routed: list[str] = []
        """The batch as last routed. While nobody comes or goes, no slot changes and no mapping is written."""

    def follow(self, scheduler_output: Any) -> None:
        """Assign and release slots as requests enter and leave the batch."""
        finished, new = scheduler_output.finished_req_ids, scheduler_output.scheduled_new_reqs
        cached = scheduler_output.scheduled_cached_reqs
        # A request id that finished and came back in one step is another request. One that a step skipped may be
        # preempted in the next, while the batch stays the same; one that is preempted may resume at once.
        left = finished.union(scheduler_output.preempted_req_ids or (), cached.resumed_req_ids)
        if not left and not new and self._runner.input_batch.req_ids == self._routed:
            return
        self._routed = []
        self._release(left)
        self.decisions.forget(finished)
        self._admit([request.req_id for request in new])
        self._admit(cached.req_ids)

    def _release(self, request_ids: set[str]) -> None:
        for request_id in request_ids & self._slot_of.keys():
            slot = self._slot_of.pop(request_id)
            self._scored.pop(request_id, None)
            self.captures.stop(request_id)
            self.decisions.stop(request_id)
            self.probes.stop(request_id)
            if slot:
                self.runtime.release(slot)
                self._free_slots.append(slot)

    def _admit(self, request_ids: list[str]) -> None:
        for request_id in request_ids:
            if request_id in self._slot_of:
                continue
            self._slot_of[request_id] = 0
            request = self._runner.requests[request_id]
            program = self.program_of(request, request.num_prompt_tokens)
            if program is None:
                continue
            if program.score is not None:
                self._scored[request_id] = program.score
            self.captures.start(request_id, program.capture)
            if program.sites:
                slot = self._free_slots.pop()
                self._slot_of[request_id] = slot
                tokens = _computed_tokens(request) if program.triggers else ()
                self.runtime.admit(slot, program, tokens, self.decisions.measured(request_id))
                self.decisions.start(request_id, slot, program)
                self.probes.start(request_id, program)

    def route(self, num_scheduled_tokens: np.ndarray) -> None:
        runner = self._runner
        request_ids = runner.input_batch.req_ids
        num_requests = len(request_ids)
        num_tokens = int(num_scheduled_tokens.sum())
        mapping_B = self._idx_mapping_B
        if request_ids != self._routed:
            mapping_B.np[:num_requests] = [self._slot_of[request_id] - 1 for request_id in request_ids]
            mapping_B.copy_to_gpu(num_requests)
            self._routed = list(request_ids)
        if self.runtime.capture_blocks:
            self.captures.collect()
        self.runtime.route(
            runner.query_start_loc.gpu[: num_requests + 1],
            mapping_B.gpu[:num_requests],
            runner.positions[:num_tokens],
            runner.input_ids.gpu[:num_tokens],
            num_tokens,
        )
        first_positions_B = runner.input_batch.num_computed_tokens_cpu[:num_requests]
        self.decisions.plan(request_ids, first_positions_B, num_scheduled_tokens)
        self.probes.plan(request_ids, first_positions_B, num_scheduled_tokens)
        if self.runtime.capture_blocks:
            positions_T = runner.positions[:num_tokens]
            self.captures.plan(request_ids, first_positions_B, num_scheduled_tokens, positions_T)
        self.scores.plan(self._scored_rows(num_scheduled_tokens) if self._scored else {})

    def computed(self, state: Any) -> Computed:
        request_ids = list(self._runner.input_batch.req_ids)
        num_tokens = state.scheduler_output.total_num_scheduled_tokens
        return Computed(
            request_ids,
            self._runner.query_start_loc.gpu[: len(request_ids) + 1],
            self._runner.positions[:num_tokens],
            state.hidden_states[:num_tokens],
        )

    def park_generators(self) -> None:
        """On a CPU, set aside the generators of requests whose prompt continues in the next step.

        vLLM draws a token for them, discards it, and rewinds their generators, which CPU generators cannot do: a seeded
        prompt in several chunks would end the engine (0.32, 0.33). Without its generator the draw does not advance it.
        """
        batch = self._runner.input_batch
        if not batch.generators or self._runner.device.type != "cpu":
            return
        discarded_B = self._runner.discard_request_mask.np[: len(batch.req_ids)]
        for index in discarded_B.nonzero()[0].tolist():
            if (generator := batch.generators.pop(index, None)) is not None:
                self._parked[batch.req_ids[index]] = generator

    def restore_generators(self) -> None:
        """Before vLLM changes the batch: give parked generators back to their requests."""
        batch = self._runner.input_batch
        for request_id, generator in self._parked.items():
            batch.generators[batch.req_id_to_index[request_id]] = generator
        self._parked.clear()

    def _scored_rows(self, num_scheduled_tokens: np.ndarray) -> dict[int, Score]:
        """Token rows of the step at which the prompt of a scored request ends."""
        batch = self._runner.input_batch
        num_requests = len(batch.req_ids)
        done_B = batch.num_computed_tokens_cpu[:num_requests] + num_scheduled_tokens
        whole_B = done_B == batch.num_prompt_tokens[:num_requests]
        ends_B = num_scheduled_tokens.cumsum()
        return {
            int(ends_B[place]) - 1: self._scored[name]
            for place, name in enumerate(batch.req_ids)
            if whole_B[place] and name in self._scored
        }


def _computed_tokens(request: Any) -> list[int]:
    """The tokens before the first position that the coming step computes."""
    return [*(request.prompt_token_ids or ()), *request.output_token_ids][: request.num_computed_tokens]


def _adapter(runner: Any) -> V1Adapter | None:
    adapter: V1Adapter | None = getattr(runner, ADAPTER, None)
    return adapter


def _update_states(original: Callable[..., Any]) -> Callable[..., Any]:
    def _update_states(self: Any, scheduler_output: Any) -> Any:
        adapter = _adapter(self)
        if adapter is None:
            return original(self, scheduler_output)
        clean_blocks(self, scheduler_output)
        adapter.restore_generators()
        result = original(self, scheduler_output)
        adapter.follow(scheduler_output)
        return result

    return _update_states


def _prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        result = original(self, scheduler_output, num_scheduled_tokens)
        if (adapter := _adapter(self)) is not None:
            adapter.route(num_scheduled_tokens)
            adapter.park_generators()
        return result

    return _prepare_inputs


RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
PATCHES = (
    Patch(Symbol(f"{RUNNER}._update_states", ("scheduler_output",)), _update_states),
    Patch(Symbol(f"{RUNNER}._prepare_inputs", ("scheduler_output", "num_scheduled_tokens")), _prepare_inputs),
    Patch(Symbol(f"{RUNNER}._dummy_run", ("num_tokens",)), idle_first),
    Patch(Symbol(f"{RUNNER}.execute_model", ("scheduler_output", "intermediate_tensors")), through_stages),
    Patch(Symbol(f"{RUNNER}.sample_tokens", ("grammar_output",)), reporting),
)


def install() -> None:
    apply(PATCHES)
