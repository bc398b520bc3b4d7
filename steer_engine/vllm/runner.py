"""What the adapters of both model runners share: one adapter links a runner to its engine's steering state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from vllm.sequence import IntermediateTensors

from steer_engine.engine.decisions import Decisions
from steer_engine.engine.outputs import CaptureBuffer, Scores, count_non_finite
from steer_engine.engine.probe_rows import PASSED_ON, ProbeRows
from steer_engine.engine.runtime import EngineRuntime
from steer_engine.engine.step_report import StepReport, to_host
from steer_engine.monitor import Watched
from steer_engine.program import PROGRAM_KEY, Program
from steer_engine.vllm.patching import Symbol

USED = (Symbol("vllm.sequence:IntermediateTensors"),)

ADAPTER = "_steer_adapter"
"""Attribute of an armed model runner."""

REPORT = "_steer_report"
"""Attribute of vLLM's `ModelRunnerOutput`: our `StepReport`."""


class Computed(NamedTuple):
    """A step whose forward pass has been launched. T token rows, B requests, D hidden size."""

    request_ids: list[str]
    """The batch in row order."""
    query_start_loc_B1: torch.Tensor
    """The first row of each request, and the end of the last one."""
    positions_T: torch.Tensor
    hidden_TD: torch.Tensor
    """The final hidden states."""


class RunnerAdapter:
    """Gives requests slots and routes each step. `runner_v1` and `runner_v2` say how, per runner."""

    def __init__(self, runner: Any, runtime: EngineRuntime) -> None:
        self.runtime = runtime
        self.captures = CaptureBuffer(runtime)
        self.scores = Scores()
        self.decisions = Decisions(runtime)
        self.probes = ProbeRows(runtime)
        self._watched: Watched | None = None
        self.runner_name = f"{type(runner).__module__}.{type(runner).__qualname__}"
        self._runner = runner

    def watch(self, watched: Watched) -> None:
        """From now on, measure the operator's monitors at the generated tokens of every request."""
        self.runtime.watch(watched)
        self._watched = watched

    def program_of(self, request: Any, prompt_len: int) -> Program | None:
        """What applies to a request as the runner knows it, monitors included; None if nothing does."""
        program = program_of(request)
        if self._watched is None or request.sampling_params is None:
            return program
        return self._watched.added_to(program, prompt_len)

    def computed(self, state: Any) -> Computed:
        """state: what vLLM keeps between the forward pass and the sampling of a step."""
        raise NotImplementedError

    def after_forward(self, step: Computed) -> StepReport | None:
        """Compute planned scores, keep what was measured. Returns what the engine core must know; None = nothing.

        Everything is launched before vLLM copies the sampled tokens to the host, so those copies also wait for ours.
        """
        self.runtime.end_step()
        if rows := self.scores.rows:
            # Only ranks that sample have logits. vLLM may have changed its own in place: these are computed once more.
            logits_RV = self._runner.model.compute_logits(step.hidden_TD[rows])
            if logits_RV is not None:
                self.scores.reduce(logits_RV)
        self.decisions.copy()
        steers = self.runtime.programs.num_steered > 0
        if not steers and not self.probes.planned:  # in a pipeline, probes may be at blocks of other stages only
            return None
        counts_B = count_non_finite(step.hidden_TD, step.query_start_loc_B1) if steers else None
        return StepReport(
            request_ids=list(step.request_ids),
            non_finite_B=None if counts_B is None else to_host(counts_B),
            probed=self.probes.collect(step.positions_T),
        )


def adapter_of(runner: Any) -> RunnerAdapter | None:
    """The adapter of an armed runner; None where the engine is not armed, or has not loaded its model."""
    adapter: RunnerAdapter | None = getattr(runner, ADAPTER, None)
    return adapter


def program_of(request: Any) -> Program | None:
    """The program of a request as the runner knows it; None if it is unsteered."""
    extra_args = request.sampling_params.extra_args if request.sampling_params is not None else None
    wire = extra_args.get(PROGRAM_KEY) if extra_args else None
    return None if wire is None else Program.from_wire(wire)


def idle_first(original: Callable[..., Any]) -> Callable[..., Any]:
    """For a dummy run, which skips the preparation of inputs: what the last step routed must not apply."""

    def dummy(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (adapter := adapter_of(self)) is not None:
            adapter.runtime.idle()
        return original(self, *args, **kwargs)

    return dummy


def reporting(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `sample_tokens`, which follows the forward pass on the ranks that sample: add our report to its output."""

    def sample_tokens(self: Any, *args: Any, **kwargs: Any) -> Any:
        adapter, state, report = adapter_of(self), self.execute_model_state, None
        # Earlier stages of a pipeline have no hidden states here.
        if adapter is not None and state is not None and state.hidden_states is not None:
            report = adapter.after_forward(adapter.computed(state))
        output = original(self, *args, **kwargs)
        if report is not None:
            setattr(_synchronous(output), REPORT, report)
        return output

    return sample_tokens


def through_stages(original: Callable[..., Any]) -> Callable[..., Any]:
    """For `execute_model`: in a pipeline, numbers of probes travel with the stream from stage to stage."""

    def execute_model(
        self: Any, scheduler_output: Any, intermediate_tensors: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        adapter = adapter_of(self)
        if adapter is not None and intermediate_tensors is not None:
            arrived = _has_numbers(intermediate_tensors)
            adapter.probes.receive(intermediate_tensors.tensors.pop(PASSED_ON) if arrived else None)
        output = original(self, scheduler_output, intermediate_tensors, *args, **kwargs)
        if adapter is not None and isinstance(output, IntermediateTensors):
            adapter.runtime.end_step()
            numbers_NK = adapter.probes.pass_on()
            output.tensors.pop(PASSED_ON, None)  # a replayed graph returns the same object again
            if numbers_NK is not None:
                output.tensors[PASSED_ON] = numbers_NK
        return output

    return execute_model


def _has_numbers(tensors: IntermediateTensors) -> bool:
    # Read as any other attribute, `tensors` waits until they have arrived.
    return PASSED_ON in vars(tensors)["tensors"]


def _synchronous(output: Any) -> Any:
    """vLLM's output of a step, without the wrapper that waits for the device (V2, V1)."""
    for name in ("model_runner_output", "_model_runner_output"):
        output = getattr(output, name, output)
    return output


def report_of(output: Any) -> StepReport | None:
    """Our report in a step's `ModelRunnerOutput`."""
    report: StepReport | None = getattr(output, REPORT, None)
    return report
