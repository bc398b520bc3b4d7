"""`steer_engine::edit_residual`: the one op that edits and reads the residual stream, inside the compiled graph.

It mutates the tensor that carries the stream and returns nothing. All it needs beyond its arguments are buffers at
fixed addresses, found through the engine whose step is running, so that nothing of the graph changes between steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from steer_engine.runtime.engine_runtime import EngineRuntime

_library: Any = torch.library.Library("steer_engine", "DEF")  # type: ignore[no-untyped-call]
_library.define("edit_residual(Tensor? hidden, Tensor(a!) carried, int site) -> ()")

_running: Callable[[], EngineRuntime] | None = None


def bind(running: Callable[[], EngineRuntime]) -> None:
    """Say how to find the runtime of the engine whose forward pass is running."""
    global _running
    _running = running


def edit_residual(hidden: torch.Tensor | None, carried: torch.Tensor, site: int) -> None:
    """Apply the step's programs at one site: x = hidden + carried (or carried alone) is edited through `carried`.

    hidden: [T, D] (or [1, T, D]) the part of a split stream that is only read; None where carried is the stream.
    carried: the same shape, edited in place. site: index among the armed blocks.
    """
    torch.ops.steer_engine.edit_residual(hidden, carried, site)


def _implementation(hidden: torch.Tensor | None, carried: torch.Tensor, site: int) -> None:
    assert _running is not None
    _running().edit(hidden, carried, site)


def _fake(hidden: torch.Tensor | None, carried: torch.Tensor, site: int) -> None:
    return None


_library.impl("edit_residual", _implementation, "CPU")
_library.impl("edit_residual", _implementation, "CUDA")
_library.impl("edit_residual", _fake, "Meta")
torch.library.register_fake("steer_engine::edit_residual", _fake, lib=_library)
