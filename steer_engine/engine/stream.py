"""Where a transformer block carries the residual stream, and the probe that finds out.

The return shape of a block does not tell: a pair (hidden, residual) may carry the stream as their sum (Llama), or in
its first part alone, with a second part that nobody reads (StableLM): a write there silently does nothing. So an
armed engine asks the model itself, once, at start-up.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import torch

from steer_engine.errors import UnsupportedEngineError


class StreamForm(StrEnum):
    """How a block hands on the residual stream."""

    SPLIT = "split"
    """(hidden, residual): the stream is their sum; we write into residual."""
    HIDDEN_ONLY = "hidden-only"
    """(hidden, leftover): the stream is the first part."""
    ONE = "one"
    """one tensor, or (hidden, None)."""


@dataclass(frozen=True, kw_only=True)
class ProbeRows:
    """The batch of the probe: equal tokens at equal positions, one row for each thing that is disturbed.

    Row 0 is left alone. Attention and its like are off, so rows do not see each other and one forward pass answers for
    all blocks.
    """

    num_blocks: int

    @property
    def num_rows(self) -> int:
        return 1 + 2 * self.num_blocks

    def row(self, block: int, part: int) -> int:
        """The row in which part 0 (hidden) or 1 (residual) of the block's output is disturbed."""
        return 1 + 2 * block + part


def disturb(output: Any, block: int, rows: ProbeRows, noise_D: torch.Tensor) -> Any:
    """The block's output with `noise_D` added to each of its parts, each in a row of its own."""
    hidden, residual = _parts(output)
    if hidden is None or hidden.shape[-2:] != (rows.num_rows, noise_D.shape[0]):
        return output
    hidden = hidden.clone()
    hidden[..., rows.row(block, 0), :] += noise_D.to(hidden.dtype)
    if not isinstance(output, tuple):
        return hidden
    if residual is None or residual.shape != hidden.shape:
        return (hidden, *output[1:])
    residual = residual.clone()
    residual[..., rows.row(block, 1), :] += noise_D.to(residual.dtype)
    return (hidden, residual, *output[2:])


def shape_of(output: Any, rows: ProbeRows, hidden_size: int) -> str:
    """ "pair", "one", or a description of an output that does not carry one stream per token row."""
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
    """What the final hidden states of the probe say about one block.

    final_TD: [rows.num_rows, D] last hidden states of the disturbed forward pass, float32.

    Raises:
        UnsupportedEngineError: neither part acts like a residual stream; names the class.
    """
    if shape not in ("pair", "one"):
        raise UnsupportedEngineError(
            f"Block {block} ({class_name}) returns {shape}, not one residual stream per token; such models cannot be "
            "steered yet. Start it unarmed (without --steering-* flags), or leave the block out of --steering-blocks."
        )
    baseline_D = final_TD[0]
    by_hidden_D = final_TD[rows.row(block, 0)] - baseline_D
    by_residual_D = final_TD[rows.row(block, 1)] - baseline_D
    size = float(by_hidden_D.norm())
    # Rounding of the model's dtype makes equal rows differ a little; an effect is far above that.
    if math.isfinite(size) and size > 1e-3 * float(baseline_D.norm()):
        if shape == "one":
            return StreamForm.ONE
        if float(by_residual_D.norm()) < 1e-2 * size:
            return StreamForm.HIDDEN_ONLY
        if float((by_hidden_D - by_residual_D).norm()) < 0.2 * size:
            return StreamForm.SPLIT
    raise UnsupportedEngineError(
        f"Block {block} ({class_name}) carries its residual stream in no known form: a change of its output's parts "
        f"moved the result by {size:.3g} and {float(by_residual_D.norm()):.3g}. Leave the block out of "
        "--steering-blocks, or start the model unarmed."
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
