"""`steer_engine::edit_residual`: the op that edits and reads the residual stream, inside the compiled graph.

Its sibling `add_rms_norm_edit` does the same inside the norm that follows a block. Each mutates what carries the
stream and returns nothing. All that it needs beyond its arguments are buffers at fixed addresses, found through the
engine whose step is running, so that nothing of the graph changes between steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from steer_engine.engine.runtime import EngineRuntime


_library: Any = torch.library.Library("steer_engine", "DEF")  # type: ignore[no-untyped-call]
_library.define("edit_residual(Tensor? hidden, Tensor(a!) carried, int site) -> ()")
_library.define(
    "add_rms_norm_edit(Tensor(a!) hidden, Tensor(b!) residual, Tensor weight, int site, float epsilon) -> ()"
)

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


def add_rms_norm_edit(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, site: int, epsilon: float
) -> None:
    """Residual add, edit and RMSNorm at once: hidden becomes the normed rows, residual the edited stream.

    hidden, residual: [T, D] the output of the site's block, both written in place. weight: [D] of the norm.
    """
    torch.ops.steer_engine.add_rms_norm_edit(hidden, residual, weight, site, epsilon)


def _implementation(hidden: torch.Tensor | None, carried: torch.Tensor, site: int) -> None:
    assert _running is not None
    _running().edit(hidden, carried, site)


def _fake(hidden: torch.Tensor | None, carried: torch.Tensor, site: int) -> None:
    return None


def _norm_implementation(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, site: int, epsilon: float
) -> None:
    assert _running is not None
    _running().edit_and_norm(hidden, residual, weight, site, epsilon)


def _norm_fake(hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, site: int, epsilon: float) -> None:
    return None


_library.impl("edit_residual", _implementation, "CPU")
_library.impl("edit_residual", _implementation, "CUDA")
_library.impl("edit_residual", _fake, "Meta")
torch.library.register_fake("steer_engine::edit_residual", _fake, lib=_library)

_library.impl("add_rms_norm_edit", _norm_implementation, "CPU")
_library.impl("add_rms_norm_edit", _norm_implementation, "CUDA")
_library.impl("add_rms_norm_edit", _norm_fake, "Meta")
torch.library.register_fake("steer_engine::add_rms_norm_edit", _norm_fake, lib=_library)
