"""What the adapters of both model runners share: one adapter links a runner to its engine's steering state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from steer_engine.engine.decisions import Decisions
from steer_engine.engine.outputs import CaptureBuffer, Scores, count_non_finite
from steer_engine.engine.runtime import EngineRuntime
from steer_engine.program import PROGRAM_KEY, Program

ADAPTER = "_steer_adapter"
"""Attribute of an armed model runner."""


class RunnerAdapter:
    """Gives requests slots and routes each step. `runner_v1` and `runner_v2` say how, per runner."""

    def __init__(self, runner: Any, runtime: EngineRuntime) -> None:
        self.runtime = runtime
        self.captures = CaptureBuffer(runtime)
        self.scores = Scores()
        self.decisions = Decisions(runtime)
        self.runner_name = f"{type(runner).__module__}.{type(runner).__qualname__}"
        self._runner = runner

    def after_forward(self, hidden_TD: torch.Tensor, query_start_loc_B1: torch.Tensor) -> torch.Tensor | None:
        """Compute planned scores, keep what was measured.

        Returns how many rows of each request are not finite; None if no request is steered.

        hidden_TD: final hidden states of the step. query_start_loc_B1: the first row of each request.
        """
        self.runtime.end_step()
        if rows := self.scores.rows:
            # Only ranks that sample have logits. vLLM may have changed its own in place: these are computed once more.
            logits_RV = self._runner.model.compute_logits(hidden_TD[rows])
            if logits_RV is not None:
                self.scores.reduce(logits_RV)
        self.decisions.copy()
        if not self.runtime.programs.steered_slots:
            return None
        return count_non_finite(hidden_TD, query_start_loc_B1)


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
