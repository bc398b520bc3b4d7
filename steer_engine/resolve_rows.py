"""Resolving the edits that read one row and write another: features, low-rank edits and rotations.

A row of a file becomes a control vector of its own, so that stores, banks and caches know only directions. All rows
are used as unit directions; their lengths are in the coefficients, so that no number leaves the range of the dtype.

Legend: D hidden size, k rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import cos, inf, radians, sin

import numpy as np

from steer_engine.derived_vectors import orthonormal_pair, rank_vectors, row_vectors, unit_of
from steer_engine.edit import LARGEST, GateBounds, Growth, Part
from steer_engine.errors import SteeringRequestError, VectorFileError
from steer_engine.fields import shown
from steer_engine.model_shape import ModelShape, describe_blocks
from steer_engine.resolve_vectors import Keep, VectorSource, check_blocks, check_direction, lookup, lookup_file
from steer_engine.settings import Limits
from steer_engine.spec import DIRECTIONAL, EditSpec, Op
from steer_engine.vectors import ControlVector, RowSet
from steer_engine.vectors.files import as_directions, as_rows, noun


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What an edit with several terms does, per block, and the largest change that it makes to any x."""

    parts: tuple[tuple[Part, ...], ...]
    growth: tuple[Growth, ...]
    doses: tuple[Growth, ...]
    """|x' - x| <= factor * |x| + amount. Without the removal of an activation that is set: it leaves x smaller."""


def check_kind(requested: EditSpec, file: ControlVector | RowSet, param: str) -> None:
    """Raise SteeringRequestError unless the operation works with such a file."""
    assert isinstance(requested.vector, str), "inline vectors are registered and named by digest before"
    try:
        if requested.op in (Op.FEATURE, Op.LOW_RANK):
            holds, needs = as_rows(file, requested.vector), "features" if requested.op is Op.FEATURE else "low_rank"
            if holds.kind != needs:
                raise SteeringRequestError(
                    f"op {requested.op.value!r} does not work with {shown(requested.vector)}, which is {noun(holds)}.",
                    param,
                )
        else:
            as_directions(file, requested.vector)
    except SteeringRequestError as error:
        raise SteeringRequestError(error.message, param) from None


def resolve_terms(
    requested: EditSpec,
    file: ControlVector | RowSet,
    blocks: tuple[int, ...],
    param: str,
    vectors: VectorSource,
    keep: Keep,
    model: ModelShape,
    limits: Limits,
) -> tuple[ControlVector | None, Terms | None]:
    """The second vector of a rotation, and the terms of an operation that has several."""
    if isinstance(file, RowSet):
        terms_of = _feature_terms if requested.op is Op.FEATURE else _low_rank_terms
        return None, terms_of(requested, file, blocks, keep, limits, param)
    if requested.op in DIRECTIONAL:
        return None, None
    assert isinstance(requested.toward, str), "inline vectors are registered and named by digest before"
    toward = lookup(requested.toward, f"{param}.toward", vectors, model)
    check_blocks(blocks, toward, f"{param}.toward", model)
    for vector, name in ((file, "vector"), (toward, "toward")):
        check_direction(vector, blocks, f"{param}.{name}")
    return toward, _rotation_terms(requested, file, toward, blocks, keep, param)


def resolve_gate(
    requested: EditSpec, blocks: tuple[int, ...], param: str, vectors: VectorSource, keep: Keep, model: ModelShape
) -> GateBounds | None:
    gate, name = requested.gate, f"{param}.gate.vector"
    if gate is None:
        return None
    shift = 0.0
    if gate.feature is not None:
        file = lookup_file(gate.vector, name, vectors, model)
        if not isinstance(file, RowSet) or file.kind != "features" or len(blocks) > 1:
            raise SteeringRequestError(
                "A gate on a feature needs a file of features, and an edit at one block: that of the feature.", name
            )
        vector, _, shift, _ = _feature_rows(file, blocks[0], gate.feature, f"{param}.gate.feature")
    else:
        vector = lookup(gate.vector, name, vectors, model)
        check_blocks(blocks, vector, name, model)
    check_direction(vector, blocks, name)
    keep(vector)
    if not gate.is_dot:
        low, high = (-2.0 if gate.min_cos is None else gate.min_cos), (2.0 if gate.max_cos is None else gate.max_cos)
        return GateBounds(vector=vector.digest, bounds=((low, high),) * len(blocks))

    def bound(number: float | None, open_: float, norm: float) -> float:
        return open_ if number is None else max(-LARGEST, min((number - shift) / norm, LARGEST))

    bounds = [
        (bound(gate.min_dot, -LARGEST, vector.norms[block]), bound(gate.max_dot, LARGEST, vector.norms[block]))
        for block in blocks
    ]
    return GateBounds(vector=vector.digest, bounds=tuple(bounds), dot=True)


def feature_blocks(requested: EditSpec, rows: RowSet, blocks: tuple[int, ...] | None, param: str) -> tuple[int, ...]:
    """The blocks of an edit of features.

    Raises:
        SteeringRequestError: the file has features at several blocks and the request names none of them.
    """
    if blocks is None and requested.op is Op.FEATURE and len(rows.blocks) > 1:
        raise SteeringRequestError(
            f"The file has features at blocks {describe_blocks(rows.blocks)}; a feature belongs to one of them: name "
            "it with 'blocks'.",
            f"{param}.blocks",
        )
    return blocks or rows.blocks


def _feature_terms(
    requested: EditSpec, rows: RowSet, blocks: Sequence[int], keep: Keep, limits: Limits, param: str
) -> Terms:
    """The terms of op 'feature'.

    Raises:
        SteeringRequestError: no such feature, too many of them, or a row of zeros.
    """
    if len(requested.features) > limits.max_rank:
        raise SteeringRequestError(
            f"{len(requested.features)} features requested; one edit may have at most {limits.max_rank} (max_rank).",
            f"{param}.feature",
        )
    found = [
        [_feature(requested, rows, block, feature, keep, param) for feature in requested.features] for block in blocks
    ]
    parts = tuple(tuple(part for part, _, _ in here) for here in found)
    grown = tuple(_growth_of_features(here) for here in found)
    removes = requested.target is not None
    doses = tuple(
        Growth(0.0 if removes else growth.factor - 1.0, sum(abs(part.c0) for part in here))
        for growth, here in zip(grown, parts, strict=True)
    )
    return Terms(parts=parts, growth=grown, doses=doses)


_Read = tuple[Part, np.ndarray, np.ndarray]
"""A part, and the unit rows that it reads and writes, float64 [D]."""


def _feature(requested: EditSpec, rows: RowSet, block: int, feature: int, keep: Keep, param: str) -> _Read:
    read, write, bias, low = _feature_rows(rows, block, feature, f"{param}.feature")
    length, size = read.norms[block], write.norms[block]
    keep(write)
    unit_e, unit_d = unit_of(read, block), unit_of(write, block)
    if requested.add is not None:
        return Part("", "", write.digest, c0=requested.add * size), unit_e, unit_d
    keep(read)
    # Active, the activation a = <x, e> + b becomes `target` or scale * a; otherwise it becomes `target` or stays 0.
    c0, share = (requested.target * size, -1.0) if requested.target is not None else (0.0, requested.scale - 1.0)
    part = Part(
        "jump",
        read.digest,
        write.digest,
        c0=c0,
        c2=share * length * size,
        c3=share * bias * size,
        lo=_above(low / length),
    )
    return part, unit_e, unit_d


def _feature_rows(
    rows: RowSet, block: int, feature: int, param: str
) -> tuple[ControlVector, ControlVector, float, float]:
    """The encoder row e and decoder row d of a feature, its bias b, and the <x, e> above which it is active.

    Raises:
        SteeringRequestError: the file has no features, not this one, or a row of zeros.
    """
    try:
        row = rows.row(block, feature)
    except VectorFileError as error:
        raise SteeringRequestError(error.message, param) from None
    read, write = row_vectors(rows, block, feature)
    if not (read.norms[block] and write.norms[block]):
        raise SteeringRequestError(
            f"Feature {feature} has a row of zeros at block {block}: it has no direction.", param
        )
    return read, write, row.bias, max(row.threshold or 0.0, 0.0) - row.bias


def _low_rank_terms(
    requested: EditSpec, rows: RowSet, blocks: Sequence[int], keep: Keep, limits: Limits, param: str
) -> Terms:
    """The terms of op 'low_rank': x + scale * (<x, W_i - R_i> + b_i) R_i for each i, all of the unedited x.

    Raises:
        SteeringRequestError: the rank is beyond the limit.
    """
    rank = max(map(rows.count, blocks))
    if rank > limits.max_rank:
        raise SteeringRequestError(
            f"The edit has rank {rank}; this server takes at most {limits.max_rank} (max_rank).", f"{param}.vector"
        )
    try:
        reads, writes = rank_vectors(rows)
    except VectorFileError:
        raise SteeringRequestError(
            "The difference of the file's W and R overflows float32.", f"{param}.vector"
        ) from None
    parts, grown, doses = [], [], []
    for block in blocks:
        here = []
        for i in range(rows.count(block)):
            read, write, bias = reads[i], writes[i], float(rows.bias[block][i])
            length, size = read.norms[block], write.norms[block]
            if not size:
                continue
            keep(write)
            # W_i = R_i reads nothing: only the bias moves x.
            c0, c2 = requested.scale * bias * size, requested.scale * length * size
            if length:
                keep(read)
                here.append(
                    (Part("read", read.digest, write.digest, c0, c2), unit_of(read, block), unit_of(write, block))
                )
            else:
                here.append((Part("", "", write.digest, c0), unit_of(write, block), unit_of(write, block)))
        parts.append(tuple(part for part, _, _ in here))
        whole, change = _norms_of(here)
        amount = sum(abs(part.c0) for part, _, _ in here)
        grown.append(Growth(max(1.0, whole), amount))
        doses.append(Growth(change, amount))
    return Terms(parts=tuple(parts), growth=tuple(grown), doses=tuple(doses))


def _rotation_terms(
    requested: EditSpec, vector: ControlVector, toward: ControlVector, blocks: Sequence[int], keep: Keep, param: str
) -> Terms:
    """The terms of op 'rotate': x turns in the plane of the two vectors, and its part in that plane keeps its length.

    Angles count from `vector` toward `toward`.

    Raises:
        SteeringRequestError: the vectors are (nearly) parallel at a block.
    """
    u, v = orthonormal_pair(vector, toward, tuple(blocks), param)
    keep(u)
    keep(v)
    if requested.degrees is not None:
        c, s = cos(radians(requested.degrees)) - 1.0, sin(radians(requested.degrees))
        parts = (
            Part("plane", v.digest, u.digest, c2=c, c3=-s),
            Part("plane", u.digest, v.digest, c2=c, c3=s),
        )
    else:
        assert requested.to_degrees is not None
        angle = radians(requested.to_degrees)
        parts = (
            Part("plane", v.digest, u.digest, c0=cos(angle), c2=-1.0),
            Part("plane", u.digest, v.digest, c0=sin(angle), c2=-1.0),
        )
    # Rounded rows are orthonormal up to rounding, so that |x| is kept up to rounding.
    growth = (Growth(),) * len(blocks)
    return Terms(parts=(parts,) * len(blocks), growth=growth, doses=growth)


def check_terms(
    terms: Terms, requested: EditSpec, blocks: Sequence[int], rows: RowSet, param: str, limits: Limits
) -> None:
    """Check that the edit changes a row by at most `max_dose` norms: its own, and the block's mean norm if known.

    Raises:
        SteeringRequestError: the dose is larger, or a number is not finite in float32.
    """
    name = next((name for name in ("target", "add") if getattr(requested, name) is not None), "scale")
    for block, dose, parts in zip(blocks, terms.doses, terms.parts, strict=True):
        residual = rows.metadata.residual_norms.get(block)
        for size in (dose.factor, dose.amount / residual if residual else 0.0):
            if size > limits.max_dose:
                raise SteeringRequestError(
                    f"The dose at block {block} is {size:.3g} residual norms; at most {limits.max_dose:g} are allowed.",
                    f"{param}.{name}",
                )
        if any(not abs(number) <= LARGEST for part in parts for number in part[3:]):
            raise SteeringRequestError(
                f"The numbers of the edit at block {block} overflow float32; use smaller ones.", f"{param}.{name}"
            )


def _growth_of_features(features: Sequence[_Read]) -> Growth:
    """Any subset of the features may be active, which removes terms from the two matrices below."""
    amount = sum(abs(part.c0) + abs(part.c3) for part, _, _ in features)
    reading = [each for each in features if each[0].mode]
    if len(reading) == 1:
        return Growth(max(1.0, _norms_of(reading)[0]), amount)
    if not reading:
        return Growth(1.0, amount)
    write = np.stack([part.c2 * d for part, _, d in reading])
    read = np.stack([e for _, e, _ in reading])
    return Growth(1.0 + float(np.linalg.norm(write, 2) * np.linalg.norm(read, 2)), amount)


def _norms_of(terms: Sequence[_Read]) -> tuple[float, float]:
    """The spectral norms of I + sum c2 * w r^T, and of the sum alone. Both are attained in the span of the rows."""
    if not terms:
        return 1.0, 0.0
    write_KD = np.stack([part.c2 * w for part, _, w in terms])
    read_KD = np.stack([r for _, r, _ in terms])
    basis_DX, _ = np.linalg.qr(np.concatenate([write_KD, read_KD]).T)
    change = (write_KD @ basis_DX).T @ (read_KD @ basis_DX)
    with np.errstate(over="ignore", invalid="ignore"):
        if not np.isfinite(change).all():
            return inf, inf
    return float(np.linalg.norm(np.eye(len(change)) + change, 2)), float(np.linalg.norm(change, 2))


def _above(number: float) -> float:
    """The smallest float32 above a number: the device compares with <=."""
    rounded = np.float32(min(max(number, -LARGEST), LARGEST))
    return float(rounded if float(rounded) > number else np.nextafter(rounded, np.float32(np.inf)))
