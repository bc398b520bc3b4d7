"""V1 model runner: slots while a request is in the input batch, routing after `_prepare_inputs`.

Wraps `GPUModelRunner.{_update_states, _prepare_inputs, _dummy_run, execute_model,
_sample, load_model}` and
`CPUModelRunner.load_model` (which overrides the base class's without calling it). Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from steer_engine.engine.capture_buffer import Reader
from steer_engine.engine.runtime import EngineRuntime
from steer_engine.engine.scores import Scores
from steer_engine.program import PROGRAM_KEY, Capture, Program, Score
from steer_engine.vllm.arming import arm, runtime_of
from steer_engine.vllm.patching import Symbol, wrap

_RUNNER = "vllm.v1.worker.gpu_model_runner:GPUModelRunner"
LOAD_MODEL = Symbol(f"{_RUNNER}.load_model")
CPU_LOAD_MODEL = Symbol("vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model")
UPDATE_STATES = Symbol(f"{_RUNNER}._update_states", ("scheduler_output",))
PREPARE_INPUTS = Symbol(f"{_RUNNER}._prepare_inputs", ("scheduler_output", "num_scheduled_tokens"))
DUMMY_RUN = Symbol(f"{_RUNNER}._dummy_run", ("num_tokens",))
EXECUTE_MODEL = Symbol(f"{_RUNNER}.execute_model", ("scheduler_output",))
SAMPLE = Symbol(f"{_RUNNER}._sample", ("logits", "spec_decode_metadata"))
SYMBOLS = (LOAD_MODEL, CPU_LOAD_MODEL, UPDATE_STATES, PREPARE_INPUTS, DUMMY_RUN, EXECUTE_MODEL, SAMPLE)

_ADAPTER = "_steer_adapter"


class V1Adapter:
    """One runner's link to its runtime. A request owns a slot exactly while it is in the input batch."""

    def __init__(self, runner: Any, runtime: EngineRuntime) -> None:
        self.runtime = runtime
        self.reader = Reader(runtime)
        self.scores = Scores()
        self._runner = runner
        self._slot_of: dict[str, int] = {}
        """All requests of the batch; slot 0 for those that are not steered."""
        self._captures: dict[str, Capture] = {}
        self._scored: dict[str, Score] = {}
        self._free_slots = list(range(runtime.max_requests, 0, -1))
        # Written inside `synchronize_input_prep`: the copy of the step before has run by then.
        self._idx_mapping_B = runner._make_buffer(runtime.max_requests, dtype=torch.int32)
        self._routed: list[str] = []
        """The batch as it was routed last. While nobody comes or goes, no slot changes and no mapping is written."""

    def follow(self, scheduler_output: Any) -> None:
        """Give and take slots as requests come into the batch and leave it."""
        finished, new = scheduler_output.finished_req_ids, scheduler_output.scheduled_new_reqs
        if not finished and not new and self._runner.input_batch.req_ids == self._routed:
            return
        self._routed = []
        self.reconcile(finished)
        self.admit([request.req_id for request in new])
        # Preempted or skipped requests left the batch and gave up their slot; back in it, they get one again.
        self.admit(scheduler_output.scheduled_cached_reqs.req_ids)

    def reconcile(self, finished: set[str]) -> None:
        """Take the slots of requests that have left the batch."""
        batch = self._runner.input_batch.req_id_to_index
        # A request id that finished and came back in one step is another request.
        for request_id in [known for known in self._slot_of if known not in batch or known in finished]:
            slot = self._slot_of.pop(request_id)
            self._scored.pop(request_id, None)
            if slot:
                self.runtime.release(slot)
                self._free_slots.append(slot)
                self._captures.pop(request_id, None)

    def admit(self, request_ids: list[str]) -> None:
        """Give slots to the steered ones of these that are new in the batch."""
        for request_id in request_ids:
            if request_id in self._slot_of:
                continue
            self._slot_of[request_id] = 0
            program = _program_of(self._runner.requests[request_id])
            if program is None:
                continue
            if program.score is not None:
                self._scored[request_id] = program.score
            if program.capture is not None and self.runtime.capture_blocks:
                self._captures[request_id] = program.capture
            elif not program.sites:
                continue
            slot = self._free_slots.pop()
            self._slot_of[request_id] = slot
            self.runtime.admit(slot, program)

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
        self.runtime.route(
            runner.query_start_loc.gpu[: num_requests + 1],
            mapping_B.gpu[:num_requests],
            runner.positions[:num_tokens],
            num_tokens,
        )
        if self._captures:
            self.reader.plan(
                [self._captures.get(request_id) for request_id in request_ids],
                runner.input_batch.num_computed_tokens_cpu[:num_requests].tolist(),
                num_scheduled_tokens.tolist(),
            )
        elif self.runtime.capture_blocks:
            self.reader.plan((), (), ())
        self.scores.plan(self._scored_rows(num_scheduled_tokens) if self._scored else {})

    def _scored_rows(self, num_scheduled_tokens: np.ndarray) -> dict[int, Score]:
        """Rows of the step's logits, one a request, that follow the whole prompt of a request that is scored."""
        batch = self._runner.input_batch
        num_requests = len(batch.req_ids)
        done_B = batch.num_computed_tokens_cpu[:num_requests] + num_scheduled_tokens
        whole_B = done_B == batch.num_prompt_tokens[:num_requests]
        return {
            row: self._scored[name] for row, name in enumerate(batch.req_ids) if whole_B[row] and name in self._scored
        }

    def stop_reading(self, key: str) -> None:
        """Nothing more is read under that key."""
        for request_id in [known for known, capture in self._captures.items() if capture.key == key]:
            del self._captures[request_id]


def adapter_of(runner: Any) -> V1Adapter | None:
    """The adapter of an armed runner, made at first use after its model was loaded."""
    adapter: V1Adapter | None = getattr(runner, _ADAPTER, None)
    if adapter is None and (runtime := runtime_of(runner)) is not None:
        adapter = V1Adapter(runner, runtime)
        setattr(runner, _ADAPTER, adapter)
    return adapter


def hook() -> None:
    for symbol in (LOAD_MODEL, CPU_LOAD_MODEL):
        wrap(symbol, _load_model)
    wrap(UPDATE_STATES, _update_states)
    wrap(PREPARE_INPUTS, _prepare_inputs)
    wrap(DUMMY_RUN, _dummy_run)
    wrap(EXECUTE_MODEL, _execute_model)
    wrap(SAMPLE, _sample)


def _program_of(request: Any) -> Program | None:
    extra_args = request.sampling_params.extra_args if request.sampling_params is not None else None
    wire = extra_args.get(PROGRAM_KEY) if extra_args else None
    return None if wire is None else Program.from_wire(wire)


def _load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        arm(self)

    return load_model


def _update_states(original: Callable[..., Any]) -> Callable[..., Any]:
    def _update_states(self: Any, scheduler_output: Any) -> Any:
        result = original(self, scheduler_output)
        if (adapter := adapter_of(self)) is not None:
            adapter.follow(scheduler_output)
        return result

    return _update_states


def _prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def _prepare_inputs(self: Any, scheduler_output: Any, num_scheduled_tokens: np.ndarray) -> Any:
        result = original(self, scheduler_output, num_scheduled_tokens)
        if (adapter := adapter_of(self)) is not None:
            adapter.route(num_scheduled_tokens)
        return result

    return _prepare_inputs


def _dummy_run(original: Callable[..., Any]) -> Callable[..., Any]:
    def _dummy_run(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (runtime := runtime_of(self)) is not None:
            runtime.idle()
        return original(self, *args, **kwargs)

    return _dummy_run


def _execute_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        adapter: V1Adapter | None = getattr(self, _ADAPTER, None)
        if adapter is not None:
            adapter.reader.collect()
        return result

    return execute_model


def _sample(original: Callable[..., Any]) -> Callable[..., Any]:
    def _sample(self: Any, logits: torch.Tensor | None, spec_decode_metadata: Any, *args: Any, **kwargs: Any) -> Any:
        adapter: V1Adapter | None = getattr(self, _ADAPTER, None)
        # With drafts a request has several rows; only ranks that sample have logits.
        if adapter is not None and adapter.scores.rows and logits is not None and spec_decode_metadata is None:
            adapter.scores.reduce(logits[adapter.scores.rows])
        return original(self, logits, spec_decode_metadata, *args, **kwargs)

    return _sample
