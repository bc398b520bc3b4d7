"""V2 model runner: slot = request-state index + 1; each step is routed on the device after `prepare_inputs`.

Wraps `GPUModelRunner.{add_requests, _remove_request, prepare_inputs, _dummy_run, execute_model, sample_tokens}` of
`vllm.v1.worker.gpu.model_runner`; the CPU class inherits them. Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from vllm.utils import length_from_prompt_token_ids_or_embeds

from steer_engine.engine.runtime import EngineRuntime
from steer_engine.program import Score
from steer_engine.vllm.non_finite import clean_blocks
from steer_engine.vllm.patching import Patch, Symbol, apply
from steer_engine.vllm.runner import ADAPTER, Computed, RunnerAdapter, idle_first, reporting, through_stages

USED = (Symbol("vllm.utils:length_from_prompt_token_ids_or_embeds"),)


class V2Adapter(RunnerAdapter):
    """Preempted requests leave and come back as new ones, program included."""

    def __init__(self, runner: Any, runtime: EngineRuntime) -> None:
        super().__init__(runner, runtime)
        self._scored: dict[str, tuple[Score, int]] = {}
        """Request id -> its score and the length of its prompt."""

    def admit(self, request: Any) -> None:
        program = self.program_of(
            request, length_from_prompt_token_ids_or_embeds(request.prompt_token_ids, request.prompt_embeds)
        )
        if program is None:
            return
        if program.score is not None:
            self._scored[request.req_id] = (program.score, len(request.prompt_token_ids or ()))
        self.captures.start(request.req_id, program.capture)
        slot = self._runner.req_states.req_id_to_index[request.req_id] + 1
        # A request that was preempted comes with its generated tokens.
        tokens = request.prefill_token_ids or request.prompt_token_ids or ()
        measured = self.decisions.measured(request.req_id)
        self.runtime.admit(slot, program, tokens[: request.num_computed_tokens], measured)
        self.decisions.start(request.req_id, slot, program)
        if program.sites:  # without them its slot is not steered, and its rows hold nothing
            self.probes.start(request.req_id, program)

    def release(self, request_id: str) -> None:
        self.captures.stop(request_id)
        self.decisions.stop(request_id)
        self.probes.stop(request_id)
        self._scored.pop(request_id, None)
        index = self._runner.req_states.req_id_to_index.get(request_id)
        if index is not None:
            self.runtime.release(index + 1)

    def route(self, batch: Any) -> None:
        if self.runtime.capture_blocks:
            self.captures.collect()
        # Positions and row starts stay on the device: with speculative decoding the host does not know them.
        self.runtime.route(
            batch.query_start_loc[: batch.num_reqs + 1],
            batch.idx_mapping.to(torch.int32),
            batch.positions[: batch.num_tokens],
            batch.input_ids[: batch.num_tokens],
            batch.num_tokens,
        )
        self.decisions.plan(batch.req_ids, batch.num_computed_tokens_np, batch.num_scheduled_tokens)
        self.probes.plan(batch.req_ids, batch.num_computed_tokens_np, batch.num_scheduled_tokens)
        self.scores.plan(self._scored_rows(batch) if self._scored else {})
        if self.runtime.capture_blocks:
            self.captures.plan(batch.req_ids, batch.num_computed_tokens_np, batch.num_scheduled_tokens, batch.positions)

    def computed(self, state: Any) -> Computed:
        batch = state.input_batch
        return Computed(
            batch.req_ids,
            batch.query_start_loc[: batch.num_reqs + 1],
            batch.positions[: batch.num_tokens],
            state.hidden_states[: batch.num_tokens],
        )

    def _scored_rows(self, batch: Any) -> dict[int, Score]:
        """Token rows of the step at which the prompt of a scored request ends."""
        rows = {}
        done_B = batch.num_computed_tokens_np + batch.num_scheduled_tokens
        for place, name in enumerate(batch.req_ids):
            score, prompt_len = self._scored.get(name, (None, 0))
            if score is not None and done_B[place] == prompt_len:
                rows[int(batch.query_start_loc_np[place + 1]) - 1] = score
        return rows


def _adapter(runner: Any) -> V2Adapter | None:
    adapter: V2Adapter | None = getattr(runner, ADAPTER, None)
    return adapter


def _add_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_requests(self: Any, scheduler_output: Any) -> None:
        clean_blocks(self, scheduler_output)
        original(self, scheduler_output)
        if (adapter := _adapter(self)) is not None:
            adapter.decisions.forget(scheduler_output.finished_req_ids)
            for request in scheduler_output.scheduled_new_reqs:
                adapter.admit(request)

    return add_requests


def _remove_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def _remove_request(self: Any, req_id: str) -> Any:
        if (adapter := _adapter(self)) is not None:
            adapter.release(req_id)
        return original(self, req_id)

    return _remove_request


def _prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(self, *args, **kwargs)
        if (adapter := _adapter(self)) is not None:
            adapter.route(batch)
        return batch

    return prepare_inputs


RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
PATCHES = (
    Patch(Symbol(f"{RUNNER}.add_requests", ("scheduler_output",)), _add_requests),
    Patch(Symbol(f"{RUNNER}._remove_request", ("req_id",)), _remove_request),
    Patch(Symbol(f"{RUNNER}.prepare_inputs", ("scheduler_output", "batch_req_state", "batch_desc")), _prepare_inputs),
    Patch(Symbol(f"{RUNNER}._dummy_run", ("num_tokens",)), idle_first),
    Patch(Symbol(f"{RUNNER}.execute_model", ("scheduler_output", "intermediate_tensors")), through_stages),
    Patch(Symbol(f"{RUNNER}.sample_tokens", ("grammar_output",)), reporting),
)


def install() -> None:
    apply(PATCHES)
