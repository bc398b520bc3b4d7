"""The custom ops that edit and capture the residual stream inside the compiled graph.

    steer_engine::edit_residual        after a block
    steer_engine::add_rms_norm_edit    inside the add and RMSNorm that follows a block

Each op mutates the tensors that carry the stream and returns nothing. Everything else it needs is in buffers at fixed
addresses, which it finds through the runtime of the engine whose step is running. So the graph is the same in every
step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from steer_engine.engine.runtime import EngineRuntime


_running: Callable[[], EngineRuntime] | None = None


def bind(running: Callable[[], EngineRuntime]) -> None:
    """Set the function that returns the runtime of the engine whose forward pass is running."""
    global _running
    _running = running


def edit_residual(hidden: torch.Tensor | None, carried: torch.Tensor, site: int) -> None:
    """Apply the step's programs at one site, in place, to x = hidden + carried (or to carried alone).

    hidden: [T, D] (or [1, T, D]) the part of a split stream that stays as it is; None if carried is the whole stream.
    carried: the same shape, edited in place. site: index among the armed blocks.
    """
    torch.ops.steer_engine.edit_residual(hidden, carried, site)


def add_rms_norm_edit(
    hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, site: int, epsilon: float
) -> None:
    """Residual add, edit and RMSNorm in one op.

    hidden: [T, D] one part of the block's output; becomes the normalised rows.
    residual: [T, D] the other part; becomes the edited stream.
    weight: [D] of the norm. epsilon: of the norm.
    """
    torch.ops.steer_engine.add_rms_norm_edit(hidden, residual, weight, site, epsilon)


def _edit(hidden: torch.Tensor | None, carried: torch.Tensor, site: int) -> None:
    assert _running is not None
    _running().edit(hidden, carried, site)


def _edit_fake(hidden: torch.Tensor | None, carried: torch.Tensor, site: int) -> None:
    return None


def _norm(hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, site: int, epsilon: float) -> None:
    assert _running is not None
    _running().edit_and_norm(hidden, residual, weight, site, epsilon)


def _norm_fake(hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, site: int, epsilon: float) -> None:
    return None


def _define(schema: str, implementation: Callable[..., None], fake: Callable[..., None]) -> None:
    name = schema.partition("(")[0]
    _library.define(schema)
    for backend, function in (("CPU", implementation), ("CUDA", implementation), ("Meta", fake)):
        _library.impl(name, function, backend)
    torch.library.register_fake(f"steer_engine::{name}", fake, lib=_library)


_library: Any = torch.library.Library("steer_engine", "DEF")  # type: ignore[no-untyped-call]
_define("edit_residual(Tensor? hidden, Tensor(a!) carried, int site) -> ()", _edit, _edit_fake)
_define(
    "add_rms_norm_edit(Tensor(a!) hidden, Tensor(b!) residual, Tensor weight, int site, float epsilon) -> ()",
    _norm,
    _norm_fake,
)
