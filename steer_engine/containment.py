"""Checks of an edit's numbers: they must be representable on the device, and the dose must stay within its limit."""

from __future__ import annotations

from steer_engine.edit import Edit
from steer_engine.errors import SteeringRequestError
from steer_engine.program import LARGEST
from steer_engine.settings import Limits
from steer_engine.spec import Op
from steer_engine.vectors import ControlVector

LARGEST_FINITE = {"float32": LARGEST, "float16": 65504.0, "bfloat16": 3.3895313892515355e38}
SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
"""The distance between neighbouring numbers near zero."""


def check_representable(edit: Edit, vector: ControlVector, param: str, dtype: str, limits: Limits) -> None:
    """Check that no number of the edit overflows or vanishes on the device.

    Bank rows have the dtype of the residual stream; coefficients and bounds are float32.

    param: path of the edit in the request. dtype: of the residual stream.

    Raises:
        SteeringRequestError: a number is not representable; `param` names its field.
    """
    largest = LARGEST_FINITE[dtype]
    for name, bound in _bounds(edit):
        if abs(bound) > largest:
            raise SteeringRequestError(
                f"{bound:g} is too large for {dtype}; the maximum is {largest:g}.", f"{param}.{name}"
            )
    if edit.op is not Op.ADD:
        return  # its row is a unit vector and its coefficient is the scale
    # Rounding near zero changes a row by up to `lost`. bfloat16 loses up to 1/256 of any number; a row that loses more
    # would steer in another direction, or not at all.
    lost = SMALLEST[dtype] / 2 * vector.hidden_size**0.5
    for block, scale in zip(edit.blocks, edit.scales, strict=True):
        norm = vector.norms[block]
        if 0.0 < norm < 256 * lost:
            raise SteeringRequestError(
                f"The vector's norm at block {block} is {norm:.3g}, too small for {dtype}; scale the vector itself up.",
                f"{param}.vector",
            )
        # No element exceeds the norm. A row contains one unscaled vector, or the sum of up to max_edits scaled ones.
        size = abs(scale) * norm * limits.max_edits
        if max(norm, size) > largest or abs(scale) * limits.max_edits > LARGEST:
            raise SteeringRequestError(
                f"The vector at block {block}, scaled by {scale:g}, overflows {dtype}; use a smaller scale.",
                f"{param}.scale",
            )


def check_dose(edit: Edit, vector: ControlVector, param: str, limits: Limits) -> None:
    """Check that the edit changes a row by at most `max_dose` norms: its own, or the block's mean norm if known.

    param: path of the edit in the request.

    Raises:
        SteeringRequestError: the dose is larger; `param` names its field.
    """
    for block, scale in zip(edit.blocks, edit.scales, strict=True):
        for name, dose in _doses(edit, abs(scale), vector.norms[block], vector.metadata.residual_norms.get(block)):
            if dose > limits.max_dose:
                raise SteeringRequestError(
                    f"The dose at block {block} is {dose:.3g} residual norms; at most {limits.max_dose:g} are allowed.",
                    f"{param}.{name}",
                )


def _doses(edit: Edit, scale: float, norm: float, residual: float | None) -> list[tuple[str, float]]:
    """The field of the request that sets the dose at one block, and the dose in residual norms.

    scale: absolute value. norm: of the vector at the block. residual: the block's mean residual norm, if known.
    """
    if edit.op in (Op.ADD_RELATIVE, Op.ABLATE):
        return [("scale", scale)]
    if residual is None:
        return []
    if edit.op is Op.ADD:
        return [("scale", scale * norm / residual)]
    if edit.op is Op.SET:
        return [("target", abs(edit.lo or 0.0) / residual)]
    # A negative lower bound and a positive upper bound move no component away from 0.
    return [("lo", (edit.lo or 0.0) / residual), ("hi", -(edit.hi or 0.0) / residual)]


def _bounds(edit: Edit) -> list[tuple[str, float]]:
    """The fields of the request that bound the component along the vector, and their values."""
    if edit.op is Op.SET:
        return [("target", bound) for bound in (edit.lo,) if bound is not None]
    return [(name, bound) for name, bound in (("lo", edit.lo), ("hi", edit.hi)) if bound is not None]
