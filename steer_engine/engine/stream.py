"""Where a transformer block carries the residual stream, and the probe that detects it at startup.

The type that a block returns does not decide this. In a pair (hidden, residual) the stream may be the sum of both
(Llama), or the first part alone while the second is never used again (StableLM); an edit of that second part would
have no effect. So an armed engine runs the model once at startup with noise in each part, and compares the effects.

Shape suffixes: T rows of the probe's batch, P parts of a block's output, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from steer_engine.errors import UnsupportedEngineError

LEAVE_OUT = "Leave the block out of --steering-blocks (with derive and dump: out of --blocks)"
"""What to do about a block whose form is not known."""


class StreamForm(StrEnum):
    """How a block returns the residual stream."""

    SPLIT = "split"
    """(hidden, residual): the stream is their sum. Edits go into residual."""
    HIDDEN_ONLY = "hidden-only"
    """(hidden, leftover): the stream is the first part."""
    ONE = "one"
    """One tensor, or (hidden, None)."""


@dataclass(frozen=True, kw_only=True)
class ProbeRows:
    """The batch of the probe: the same token at the same position in every row, one row per perturbed part.

    Row 0 is not perturbed. Attention and similar layers see only their own row, so rows do not affect each other, and a
    single forward pass covers all blocks.
    """

    num_blocks: int

    @property
    def num_rows(self) -> int:
        return 1 + 2 * self.num_blocks

    def row(self, block: int, part: int) -> int:
        """The row in which part 0 (hidden) or 1 (residual) of the block's output is perturbed."""
        return 1 + 2 * block + part


def perturb(output: Any, block: int, rows: ProbeRows, noise_D: torch.Tensor) -> Any:
    """A copy of the block's output with noise added to each part, each in its own row.

    The noise has the direction of `noise_D` and the norm of the block's own stream. In a 16-bit dtype, smaller noise
    would be lost: rows of Gemma 3 have norms up to 100,000, where bfloat16 rounds a single element by up to 256.
    """
    hidden, residual = _parts(output)
    if hidden is None or hidden.shape[-2:] != (rows.num_rows, noise_D.shape[0]):
        return output
    paired = residual is not None and residual.shape == hidden.shape
    noise_D = noise_beside(noise_D, [hidden, residual] if paired and residual is not None else [hidden])
    hidden = hidden.clone()
    hidden[..., rows.row(block, 0), :] += noise_D.to(hidden.dtype)
    if not isinstance(output, tuple):
        return hidden
    if residual is None or not paired:
        return (hidden, *output[1:])
    residual = residual.clone()
    residual[..., rows.row(block, 1), :] += noise_D.to(residual.dtype)
    return (hidden, residual, *output[2:])


def noise_beside(noise_D: torch.Tensor, parts: list[torch.Tensor], factor: float = 1.0) -> torch.Tensor:
    """float32 [D]: `noise_D` with `factor` times the norm of row 0 of the largest part. Unchanged for a row of zeros.

    An element near the end of the dtype's range gets less, so that neither a part nor the sum overflows.
    """
    rows_PD = torch.stack([part.reshape(-1, noise_D.shape[0])[0].float() for part in parts])
    size = rows_PD.norm(dim=1).max()
    scaled_D = torch.where(size > 0, noise_D * (factor * size / noise_D.norm()), noise_D)
    room_D = (torch.finfo(parts[0].dtype).max - rows_PD.abs().sum(0)).clamp(min=0) / 2
    return scaled_D.clamp(-room_D, room_D)


def classify_output(output: Any, rows: ProbeRows, hidden_size: int) -> str:
    """ "pair" or "one"; otherwise a description of an output that does not carry one stream per token row."""
    hidden, residual = _parts(output)
    second = output[1] if isinstance(output, tuple) and len(output) == 2 else None
    extra = isinstance(output, tuple) and len(output) > 2
    if hidden is None or extra or hidden.numel() != rows.num_rows * hidden_size:
        return _describe(output)
    if hidden.shape[-2:] != (rows.num_rows, hidden_size) or second is not residual:
        return _describe(output)
    if residual is None:
        return "one"
    return "pair" if residual.shape == hidden.shape else _describe(output)


def stream_form(block: int, shape: str, rows: ProbeRows, final_TD: torch.Tensor, class_name: str) -> StreamForm:
    """The form of one block, from the effects of the noise on the model's final hidden states.

    shape: the result of `classify_output` for this block.
    final_TD: [rows.num_rows, D] last hidden states of the perturbed forward pass, float32.

    Raises:
        UnsupportedEngineError: neither part acts like a residual stream. The message names the class.
    """
    if shape not in ("pair", "one"):
        raise UnsupportedEngineError(
            f"Block {block} ({class_name}) returns {shape}, not one residual stream per token; such models cannot be "
            f"steered yet. {LEAVE_OUT}, or start the model unarmed (without --steering-* flags)."
        )
    baseline_D = final_TD[0]
    by_hidden_D = final_TD[rows.row(block, 0)] - baseline_D
    by_residual_D = final_TD[rows.row(block, 1)] - baseline_D
    size = float(by_hidden_D.norm())
    # Rounding in the model's dtype makes equal rows differ slightly; noise as large as the stream does far more.
    if math.isfinite(size) and size > 1e-3 * float(baseline_D.norm()):
        if shape == "one":
            return StreamForm.ONE
        if float(by_residual_D.norm()) < 1e-2 * size:
            return StreamForm.HIDDEN_ONLY
        if float((by_hidden_D - by_residual_D).norm()) < 0.2 * size:
            return StreamForm.SPLIT
    raise UnsupportedEngineError(
        f"Block {block} ({class_name}) carries its residual stream in no known form: noise in the parts of its output "
        f"changed the final hidden states by {size:.3g} and {float(by_residual_D.norm()):.3g}. "
        f"{LEAVE_OUT}, or start the model unarmed."
    )


def _parts(output: Any) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    if isinstance(output, torch.Tensor):
        return output, None
    if isinstance(output, tuple) and output and isinstance(output[0], torch.Tensor):
        second = output[1] if len(output) > 1 else None
        return output[0], second if isinstance(second, torch.Tensor) else None
    return None, None


def _describe(output: Any) -> str:
    parts: Sequence[Any] = output if isinstance(output, (tuple, list)) else [output]
    shapes = [list(part.shape) if isinstance(part, torch.Tensor) else type(part).__name__ for part in parts]
    return f"{type(output).__name__} of {shapes}"
