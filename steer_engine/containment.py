"""Numeric containment: a spec whose edits could produce a number that is not finite is refused.

A non-finite value in a KV block outlives its request: attention over the reused block spreads it to others. So three
checks run while a spec is resolved: each number is representable on the device, each dose is within its limit, and all
edits together cannot grow the residual stream beyond what its dtype holds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import fsum, prod

from steer_engine.edit import LARGEST, Edit, Growth
from steer_engine.errors import SteeringRequestError
from steer_engine.settings import Limits
from steer_engine.site import Site
from steer_engine.spec import Op
from steer_engine.vectors import ControlVector

LARGEST_FINITE = {"float32": LARGEST, "float16": 65504.0, "bfloat16": 3.3895313892515355e38}
SMALLEST = {"float32": 2.0**-149, "float16": 2.0**-24, "bfloat16": 2.0**-133}
"""The distance between neighbouring numbers near zero."""

MAX_STREAM_NORM = {"float32": 1e18, "float16": LARGEST_FINITE["float16"], "bfloat16": 1e18}
"""Largest norm of an edited row. Norms are computed in float32, where squares overflow beyond 1.8e19."""

PEAK_NORMS = 256.0
"""Bound on the largest row of an unedited stream, in mean residual norms. First tokens have the largest rows: 24,000 in
SmolLM2-135M, where other tokens have 180; 100,000 in Gemma 3 270M, where others have 36,800."""

ASSUMED_PEAK = {"float32": 1e6, "float16": LARGEST_FINITE["float16"] / 2, "bfloat16": 1e6}
"""Norm of the largest row of an unedited stream. The residual norms of a vector's file can raise it, but never lower
it: a client may have written them, and a file may know early blocks only, whose rows are the smallest. In float16 it is
fixed, because a model that runs in float16 stays within its range."""


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
    lowest, highest = vector.norm_range
    factor = max(1.0, max(map(abs, edit.peak_scales)) * limits.max_edits)
    if lowest >= 256 * lost and highest * factor <= largest and factor <= LARGEST:
        return  # true for all blocks of the vector; otherwise look at those of the edit
    for block, scale in zip(edit.blocks, edit.peak_scales, strict=True):
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


def check_measurable(vector: ControlVector, blocks: Sequence[int], param: str, dtype: str) -> None:
    """Check that the rows of a condition's vector neither overflow nor vanish on the device.

    Raises:
        SteeringRequestError: a row does; `param` names the vector.
    """
    lowest, highest = 256 * SMALLEST[dtype] / 2 * vector.hidden_size**0.5, LARGEST_FINITE[dtype]
    for block in blocks:
        if not lowest <= vector.norms[block] <= highest:
            raise SteeringRequestError(
                f"The vector's norm at block {block} is {vector.norms[block]:.3g}; {dtype} needs {lowest:.2g} to "
                f"{highest:.2g}. Scale the vector itself.",
                param,
            )


def check_dose(edit: Edit, vector: ControlVector, param: str, limits: Limits) -> None:
    """Check that the edit changes a row by at most `max_dose` norms: its own, or the block's mean norm if known.

    param: path of the edit in the request.

    Raises:
        SteeringRequestError: the dose is larger; `param` names its field.
    """
    norms, residual_norms = vector.norms, vector.metadata.residual_norms
    if edit.op is Op.ADD and not residual_norms:
        return
    for block, scale in zip(edit.blocks, edit.peak_scales, strict=True):
        for name, dose in _doses(edit, abs(scale), norms[block], residual_norms.get(block)):
            if dose > limits.max_dose:
                raise SteeringRequestError(
                    f"The dose at block {block} is {dose:.3g} residual norms; at most {limits.max_dose:g} are allowed.",
                    f"{param}.{name}",
                )


def largest_dose(edits: Iterable[Edit], vectors: Mapping[str, ControlVector]) -> float | None:
    """The largest dose of an `add` at a block, in mean residual norms; None if no vector's file has them.

    vectors: by digest.
    """
    doses = []
    for edit in edits:
        vector = vectors.get(edit.vector)
        if vector is None or edit.op is not Op.ADD:
            continue
        norms = vector.metadata.residual_norms
        for block, scale in zip(edit.blocks, edit.peak_scales, strict=True):
            if norms.get(block):
                doses.append(abs(scale) * vector.norms[block] / norms[block])
    return max(doses, default=None)


def check_growth(
    edits: Sequence[Edit], vectors: Mapping[str, ControlVector], *, preserve_norm: bool, dtype: str
) -> None:
    """Check that the edits together leave every row of the residual stream finite.

    The bound holds for any token row and any order: each operation multiplies the row's norm by at most one factor, or
    adds at most one amount, and the model's blocks add no more than they do without edits, since they normalise their
    input. With `preserve_norm` the norm is restored after each block, so that blocks are bounded one by one. Edits of
    the outputs inside blocks can only add to the stream what they change (see `_changed_outputs`).

    vectors: by digest. dtype: of the residual stream.

    Raises:
        SteeringRequestError: the bound exceeds MAX_STREAM_NORM.
    """
    peak, limit = _peak(vectors.values(), dtype), MAX_STREAM_NORM[dtype]
    added, largest = _changed_outputs([edit for edit in edits if edit.site is not Site.BLOCK], vectors, peak)
    if preserve_norm:
        added = 2.0 * peak * len({point for edit in edits if edit.site is not Site.BLOCK for point in edit.points})
    edits = [edit for edit in edits if edit.site is Site.BLOCK]
    peak += added
    if preserve_norm:
        at_block: dict[int, list[_Dose]] = {}
        for edit in edits:
            norms, grown = _norms_of(edit, vectors), edit.growth or (Growth(),) * len(edit.blocks)
            for block, scale, growth in zip(edit.blocks, edit.peak_scales, grown, strict=True):
                at_block.setdefault(block, []).append((edit, (scale,), (norms[block],), (growth,)))
        bound = max((_grown(peak, doses) for doses in at_block.values()), default=peak)
    else:
        bound = _grown(
            peak, [(edit, edit.peak_scales, list(_norms_of(edit, vectors).values()), edit.growth) for edit in edits]
        )
    bound = max(bound, largest)
    if not bound <= limit:
        raise SteeringRequestError(
            f"The edits together could grow the residual stream to a norm of {bound:.2g}; {dtype} holds {limit:.2g}. "
            "Lower the scales or targets, or edit fewer blocks.",
            "steering.edits",
        )


_Dose = tuple[Edit, Sequence[float], Sequence[float], Sequence[Growth]]
"""An edit, and for each of some blocks its scale, the norm of its vector, and what its parts may do."""


def _norms_of(edit: Edit, vectors: Mapping[str, ControlVector]) -> dict[int, float]:
    """By block, the norm of the edit's vector; 0 for an edit with parts, which has no vector of its own."""
    return {block: 0.0 if edit.parts else vectors[edit.vector].norms[block] for block in edit.blocks}


def _grown(peak: float, doses: Iterable[_Dose]) -> float:
    """The largest norm of a row that enters with norm `peak` and gets these doses."""
    factor, amount = 1.0, 0.0
    for edit, scales, norms, grown in doses:
        match edit.op:
            case Op.ADD:
                amount += fsum(abs(scale) * norm for scale, norm in zip(scales, norms, strict=True))
            case Op.ADD_RELATIVE:
                factor *= prod(1.0 + abs(scale) for scale in scales)
            case Op.ABLATE:
                factor *= prod(max(1.0, abs(1.0 - scale)) for scale in scales)
            case Op.CLAMP | Op.SET:
                # A component inside the bounds stays; one outside moves to the nearer bound.
                amount += len(scales) * max(edit.lo or 0.0, -(edit.hi or 0.0), 0.0)
            case Op.FEATURE | Op.LOW_RANK | Op.ROTATE:
                factor *= prod(growth.factor for growth in grown)
                amount += fsum(growth.amount for growth in grown)
    return factor * (peak + amount)


def _changed_outputs(edits: Iterable[Edit], vectors: Mapping[str, ControlVector], peak: float) -> tuple[float, float]:
    """For edits of the outputs of attention and MLP: how much they add to the stream in all, at most, and the largest
    norm of an edited output.

    An unedited output takes a row of the stream to another one, so it is bounded like those: by `peak`. What the stream
    gets is the change of the output. Unlike at a block's output, a smaller output may leave a larger stream.
    """
    sizes: dict[int, float] = {}
    for edit in edits:
        norms, grown = _norms_of(edit, vectors), edit.growth or (Growth(),) * len(edit.blocks)
        for point, norm, scale, growth in zip(edit.points, norms.values(), edit.peak_scales, grown, strict=True):
            size = sizes.get(point, peak)
            sizes[point] = size + _change(edit, abs(scale), norm, growth, size)
    return fsum(size - peak for size in sizes.values()), max(sizes.values(), default=0.0)


def _change(edit: Edit, scale: float, norm: float, growth: Growth, size: float) -> float:
    """The largest |x' - x| for |x| <= size. scale: absolute value. norm: of the vector. growth: of parts."""
    match edit.op:
        case Op.ADD:
            return scale * norm
        case Op.ADD_RELATIVE | Op.ABLATE:
            return scale * size
        case Op.CLAMP | Op.SET:
            return size + max(edit.lo or 0.0, -(edit.hi or 0.0), 0.0)
        case Op.FEATURE | Op.LOW_RANK | Op.ROTATE:
            return (growth.factor + 1.0) * size + growth.amount


def _peak(vectors: Iterable[ControlVector], dtype: str) -> float:
    """Bound on the norm of the largest row of the unedited stream."""
    assumed = ASSUMED_PEAK[dtype]
    if dtype == "float16":
        return assumed
    known = [norm for vector in vectors for norm in vector.metadata.residual_norms.values()]
    return max(assumed, PEAK_NORMS * max(known, default=0.0))


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
