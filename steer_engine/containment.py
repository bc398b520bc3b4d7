"""Whether an edit's numbers fit: into device memory, and into what a residual stream survives."""

from __future__ import annotations

from steer_engine.edit import Edit
from steer_engine.errors import SteeringRequestError
from steer_engine.program import LARGEST
from steer_engine.settings import Limits
from steer_engine.spec import Op
from steer_engine.vectors import ControlVector

LARGEST_FINITE = {"float32": LARGEST, "float16": 65504.0, "bfloat16": 3.3895313892515355e38}
SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
"""The spacing of numbers near zero."""


def check_representable(edit: Edit, vector: ControlVector, param: str, dtype: str, limits: Limits) -> None:
    """Bank rows (in the stream's dtype), coefficients and bounds (in float32) can hold what the edit needs.

    Raises:
        SteeringRequestError: they cannot.
    """
    largest = LARGEST_FINITE[dtype]
    for name, bound in _bounds(edit):
        if abs(bound) > largest:
            raise SteeringRequestError(f"{bound:g} is more than {dtype} can hold.", f"{param}.{name}")
    if edit.op is not Op.ADD:
        return  # its row is a unit vector, its coefficient the scale
    # Rounding numbers near zero moves a row by this much. One that loses more than a 256th, which is what bfloat16 may
    # lose anywhere, would steer by something else, or not at all.
    lost = SMALLEST[dtype] / 2 * vector.hidden_size**0.5
    for block, scale in zip(edit.blocks, edit.scales, strict=True):
        norm = vector.norms[block]
        if 0.0 < norm < 256 * lost:
            raise SteeringRequestError(
                f"The vector's norm at block {block} is {norm:.3g}, too small for {dtype}; scale the vector itself up.",
                f"{param}.vector",
            )
        # A norm bounds every element. A row holds one vector as it is, or the sum of up to max_edits scaled ones.
        size = abs(scale) * norm * limits.max_edits
        if max(norm, size) > largest or abs(scale) * limits.max_edits > LARGEST:
            raise SteeringRequestError(
                f"The vector at block {block}, scaled by {scale:g}, overflows {dtype}.", f"{param}.scale"
            )


def check_dose(edit: Edit, vector: ControlVector, param: str, limits: Limits) -> None:
    """No edit changes a row by more than `max_dose` norms: its own, or the mean of the block where that is known.

    Raises:
        SteeringRequestError: it would.
    """
    for block, scale in zip(edit.blocks, edit.scales, strict=True):
        for name, dose in _doses(edit, abs(scale), vector.norms[block], vector.metadata.residual_norms.get(block)):
            if dose > limits.max_dose:
                raise SteeringRequestError(
                    f"The dose at block {block} is {dose:.3g} residual norms; at most {limits.max_dose:g} are allowed.",
                    f"{param}.{name}",
                )


def _doses(edit: Edit, scale: float, norm: float, residual: float | None) -> list[tuple[str, float]]:
    """The dose at one block, by the field in which a client gives it."""
    if edit.op in (Op.ADD_RELATIVE, Op.ABLATE):
        return [("scale", scale)]
    if residual is None:
        return []
    if edit.op is Op.ADD:
        return [("scale", scale * norm / residual)]
    if edit.op is Op.SET:
        return [("target", abs(edit.lo or 0.0) / residual)]
    # A low bound below 0, and a high one above it, move no component away from 0.
    return [("lo", (edit.lo or 0.0) / residual), ("hi", -(edit.hi or 0.0) / residual)]


def _bounds(edit: Edit) -> list[tuple[str, float]]:
    """What holds the component along the vector, by the field in which a client gives it."""
    if edit.op is Op.SET:
        return [("target", bound) for bound in (edit.lo,) if bound is not None]
    return [(name, bound) for name, bound in (("lo", edit.lo), ("hi", edit.hi)) if bound is not None]
