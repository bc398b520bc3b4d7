"""What the adapters of both model runners share: one adapter links a runner to its engine's steering state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steer_engine.engine.outputs import CaptureBuffer, Scores
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
        self.runner_name = f"{type(runner).__module__}.{type(runner).__qualname__}"
        self._runner = runner


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
