"""V2 model runner: slot = request-state index + 1, routing on the device after `prepare_inputs`.

Wraps `GPUModelRunner.{load_model, add_requests, _remove_request, prepare_inputs, _dummy_run, capture_model,
execute_model, sample}` of `vllm.v1.worker.gpu.model_runner`; the CPU class inherits them all. Known for vLLM 0.32 and
0.33.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from steer_engine.engine.capture_buffer import Reader
from steer_engine.engine.runtime import EngineRuntime
from steer_engine.engine.scores import Scores
from steer_engine.program import PROGRAM_KEY, Capture, Program, Score
from steer_engine.vllm.arming import arm, runtime_of
from steer_engine.vllm.patching import Symbol, wrap

_RUNNER = "vllm.v1.worker.gpu.model_runner:GPUModelRunner"
LOAD_MODEL = Symbol(f"{_RUNNER}.load_model")
ADD_REQUESTS = Symbol(f"{_RUNNER}.add_requests", ("scheduler_output",))
REMOVE_REQUEST = Symbol(f"{_RUNNER}._remove_request", ("req_id",))
PREPARE_INPUTS = Symbol(f"{_RUNNER}.prepare_inputs", ("scheduler_output", "batch_req_state", "batch_desc"))
DUMMY_RUN = Symbol(f"{_RUNNER}._dummy_run", ("num_tokens",))
CAPTURE_MODEL = Symbol(f"{_RUNNER}.capture_model")
EXECUTE_MODEL = Symbol(f"{_RUNNER}.execute_model", ("scheduler_output", "dummy_run"))
SAMPLE = Symbol(f"{_RUNNER}.sample", ("hidden_states", "input_batch"))
SYMBOLS = (LOAD_MODEL, ADD_REQUESTS, REMOVE_REQUEST, PREPARE_INPUTS, DUMMY_RUN, CAPTURE_MODEL, EXECUTE_MODEL, SAMPLE)

_ADAPTER = "_steer_adapter"


class V2Adapter:
    """One runner's link to its runtime. Preempted requests leave and come back as new ones, program included."""

    def __init__(self, runner: Any, runtime: EngineRuntime) -> None:
        self.runtime = runtime
        self.reader = Reader(runtime)
        self.scores = Scores()
        self._runner = runner
        self._captures: dict[str, Capture] = {}
        self._scored: dict[str, tuple[Score, int]] = {}
        """With the length of the prompt."""

    def admit(self, request: Any) -> None:
        extra_args = request.sampling_params.extra_args if request.sampling_params is not None else None
        wire = extra_args.get(PROGRAM_KEY) if extra_args else None
        if wire is None:
            return
        program = Program.from_wire(wire)
        if program.score is not None:
            self._scored[request.req_id] = (program.score, len(request.prompt_token_ids or ()))
        if program.capture is not None and self.runtime.capture_blocks:
            self._captures[request.req_id] = program.capture
        self.runtime.admit(self._runner.req_states.req_id_to_index[request.req_id] + 1, program)

    def release(self, request_id: str) -> None:
        self._captures.pop(request_id, None)
        self._scored.pop(request_id, None)
        index = self._runner.req_states.req_id_to_index.get(request_id)
        if index is not None:
            self.runtime.release(index + 1)

    def route(self, batch: Any) -> None:
        # Positions and row starts are read on the device: with speculative decoding the host does not know them.
        self.runtime.route(
            batch.query_start_loc[: batch.num_reqs + 1],
            batch.idx_mapping.to(torch.int32),
            batch.positions[: batch.num_tokens],
            batch.num_tokens,
        )
        self.scores.plan(self._scored_rows(batch) if self._scored else {})
        if not self.runtime.capture_blocks:
            return
        if not self._captures:
            self.reader.plan((), (), ())
            return
        self.reader.plan(
            [self._captures.get(request_id) for request_id in batch.req_ids],
            batch.num_computed_tokens_np.tolist(),
            batch.num_scheduled_tokens.tolist(),
        )

    def _scored_rows(self, batch: Any) -> dict[int, Score]:
        """Token rows of the step at which the prompt of a request that is scored ends."""
        rows = {}
        done_B = batch.num_computed_tokens_np + batch.num_scheduled_tokens
        for place, name in enumerate(batch.req_ids):
            score, prompt_len = self._scored.get(name, (None, 0))
            if score is not None and done_B[place] == prompt_len:
                rows[int(batch.query_start_loc_np[place + 1]) - 1] = score
        return rows

    def stop_reading(self, key: str) -> None:
        """Nothing more is read under that key."""
        for request_id in [known for known, capture in self._captures.items() if capture.key == key]:
            del self._captures[request_id]


def adapter_of(runner: Any) -> V2Adapter | None:
    """The adapter of an armed runner, made at first use after its model was loaded."""
    adapter: V2Adapter | None = getattr(runner, _ADAPTER, None)
    if adapter is None and (runtime := runtime_of(runner)) is not None:
        adapter = V2Adapter(runner, runtime)
        setattr(runner, _ADAPTER, adapter)
    return adapter


def hook() -> None:
    wrap(LOAD_MODEL, _load_model)
    wrap(ADD_REQUESTS, _add_requests)
    wrap(REMOVE_REQUEST, _remove_request)
    wrap(PREPARE_INPUTS, _prepare_inputs)
    for symbol in (DUMMY_RUN, CAPTURE_MODEL):
        wrap(symbol, _dummy)
    wrap(EXECUTE_MODEL, _execute_model)
    wrap(SAMPLE, _sample)


def _load_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        arm(self)

    return load_model


def _add_requests(original: Callable[..., Any]) -> Callable[..., Any]:
    def add_requests(self: Any, scheduler_output: Any) -> None:
        original(self, scheduler_output)
        if (adapter := adapter_of(self)) is not None:
            for request in scheduler_output.scheduled_new_reqs:
                adapter.admit(request)

    return add_requests


def _remove_request(original: Callable[..., Any]) -> Callable[..., Any]:
    def _remove_request(self: Any, req_id: str) -> Any:
        if (adapter := adapter_of(self)) is not None:
            adapter.release(req_id)
        return original(self, req_id)

    return _remove_request


def _prepare_inputs(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare_inputs(self: Any, *args: Any, **kwargs: Any) -> Any:
        batch = original(self, *args, **kwargs)
        if (adapter := adapter_of(self)) is not None:
            adapter.route(batch)
        return batch

    return prepare_inputs


def _dummy(original: Callable[..., Any]) -> Callable[..., Any]:
    def dummy(self: Any, *args: Any, **kwargs: Any) -> Any:
        # A dummy run skips `prepare_inputs`: what the last step routed would still stand.
        if (runtime := runtime_of(self)) is not None:
            runtime.idle()
        return original(self, *args, **kwargs)

    return dummy


def _execute_model(original: Callable[..., Any]) -> Callable[..., Any]:
    def execute_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(self, *args, **kwargs)
        adapter: V2Adapter | None = getattr(self, _ADAPTER, None)
        if adapter is not None:
            adapter.reader.collect()
        return result

    return execute_model


def _sample(original: Callable[..., Any]) -> Callable[..., Any]:
    def sample(self: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        adapter: V2Adapter | None = getattr(self, _ADAPTER, None)
        if adapter is not None and (rows := adapter.scores.rows):
            # The sampler keeps its logits to itself: those of the rows that are scored are computed once more.
            logits_RV = self.model.compute_logits(hidden_states[rows])
            if logits_RV is not None:
                adapter.scores.reduce(logits_RV)
        return original(self, hidden_states, *args, **kwargs)

    return sample
