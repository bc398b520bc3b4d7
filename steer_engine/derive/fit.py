"""From readings to directions and residual norms."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from steer_engine.derive.activations import Reading
from steer_engine.derive.dump_folder import Manifest
from steer_engine.derive.methods import FROM_MOMENTS, FROM_ROWS, require_method
from steer_engine.derive.moments import Moments, Rows, Sums, explained_variance, held_out_auroc, mean_difference
from steer_engine.errors import DerivationError
from steer_engine.vectors.control_vector import ControlVector
from steer_engine.vectors.metadata import VectorMetadata

MAX_ROWS_BYTES = 1 << 30
"""Rows kept in memory by the methods that need them."""

SAMPLE_BYTES = 1 << 28
"""Rows kept by the other methods, of the first pairs, to say how well the direction separates."""

SAMPLE_PAIRS = 1000
"""Pairs whose rows those methods keep at most: an AUROC over half of them is known to a few hundredths, and from there
on memory does not grow with the data."""

ZERO = 2.0**-20
"""A direction shorter than this, in mean residual norms, is what float32 rounding leaves of nothing: a relative error
of 2**-24 per value read, times 16 for the model's own roundings behind it."""


class Readings:
    """What has been read so far, merged in the order of the chunks."""

    def __init__(self) -> None:
        self._positive: Moments | None = None
        self._negative: Moments | None = None
        self._positive_NLD: list[Rows] = []
        self._negative_NLD: list[Rows] = []
        self._next = 0

    def add(self, reading: Reading) -> None:
        """Merge the next chunk; out of order is a bug, since sums would depend on it."""
        assert reading.index == self._next, f"chunk {reading.index} came where {self._next} was due"
        self._next += 1
        self._positive = reading.positive if self._positive is None else self._positive + reading.positive
        self._negative = reading.negative if self._negative is None else self._negative + reading.negative
        if reading.positive_NLD is not None and reading.negative_NLD is not None:
            self._positive_NLD.append(reading.positive_NLD)
            self._negative_NLD.append(reading.negative_NLD)

    @property
    def moments(self) -> tuple[Moments, Moments]:
        assert self._positive is not None
        assert self._negative is not None
        return self._positive, self._negative

    @property
    def num_rows(self) -> int:
        """Pairs whose rows were kept."""
        return sum(len(rows) for rows in self._positive_NLD)

    def rows(self, which: int) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Positive and negative rows `[N, D]` of the block at place `which`, in float64."""
        assert self._positive_NLD, "rows were not kept"
        positive = np.concatenate([rows[:, which] for rows in self._positive_NLD]).astype(np.float64)
        negative = np.concatenate([rows[:, which] for rows in self._negative_NLD]).astype(np.float64)
        return positive, negative


@dataclass(frozen=True, kw_only=True)
class Fit:
    """What was fitted, by block: directions, mean residual norms, held-out AUROC where there are pairs enough, and the
    share of the paired differences' squares along the direction where rows were kept."""

    directions: dict[int, npt.NDArray[np.float32]]
    residual_norms: dict[int, float]
    separation: dict[int, float]
    explained: dict[int, float] = field(default_factory=dict)


def fit(readings: Readings, method: str, blocks: Sequence[int]) -> Fit:
    """Directions of a method, with what is to be known about them.

    Raises:
        DerivationError: positives and negatives do not differ where they were read.
    """
    require_method(method)
    positive, negative = readings.moments
    norm_L = (positive.norm_L + negative.norm_L) / (positive.norm_count + negative.norm_count)
    if method in FROM_MOMENTS:
        directions_LD = FROM_MOMENTS[method](positive, negative)
    else:
        directions_LD = np.stack([FROM_ROWS[method](*readings.rows(which)) for which in range(len(blocks))])
    require_directions(directions_LD, norm_L, blocks)
    return Fit(
        directions={block: directions_LD[i].astype(np.float32) for i, block in enumerate(blocks)},
        residual_norms={block: float(norm_L[i]) for i, block in enumerate(blocks)},
        separation=_separation(readings, method, blocks),
        explained=_explained(readings, directions_LD, blocks),
    )


def require_directions(directions_LD: Sums, norm_L: Sums, blocks: Sequence[int]) -> None:
    """Raise DerivationError that names the blocks whose direction is nothing but rounding, or nothing at all."""
    length_L = np.linalg.norm(directions_LD, axis=1)
    zero = [block for block, length, norm in zip(blocks, length_L, norm_L, strict=True) if length <= ZERO * norm]
    if zero:
        raise DerivationError(
            f"Positives and negatives do not differ at block(s) {', '.join(map(str, zero))}: "
            "the direction there is zero. "
            "Texts that differ only before the position read, or the same texts on both sides, do this; "
            "choose other pairs, blocks or another position."
        )


def vector_of(fitted: Fit, manifest: Manifest, method: str) -> ControlVector:
    """The control vector that says where it is from."""
    unit = "pairs" if manifest.paired else "texts"
    number = manifest.num_texts // 2 if manifest.paired else manifest.num_texts
    return ControlVector(
        directions=fitted.directions,
        metadata=VectorMetadata(
            model=manifest.model,
            architecture=manifest.architecture,
            hidden_size=manifest.hidden_size,
            num_blocks=manifest.num_blocks,
            method=method,
            position=manifest.position,
            residual_norms=fitted.residual_norms,
            separation=fitted.separation,
            explained_variance=fitted.explained,
            dataset_digest=manifest.dataset,
            created_with=manifest.versions,
            notes=f"{number} {unit}, read in {manifest.dtype}{', chat template' if manifest.chat else ''}.",
        ),
    )


def _explained(readings: Readings, directions_LD: Sums, blocks: Sequence[int]) -> dict[int, float]:
    """Of the pairs whose rows were kept."""
    if not readings.num_rows:
        return {}
    differences = ([positive - negative] for positive, negative in map(readings.rows, range(len(blocks))))
    shares = (
        (block, explained_variance(parts, directions_LD[i]))
        for i, (block, parts) in enumerate(zip(blocks, differences, strict=True))
    )
    return {block: share for block, share in shares if share is not None}


def _separation(readings: Readings, method: str, blocks: Sequence[int]) -> dict[int, float]:
    if method == "mean" or not readings.num_rows:  # the mean of one side is not made to tell sides apart
        return {}
    row_method = FROM_ROWS.get(method, mean_difference)
    areas = ((block, held_out_auroc(*readings.rows(which), row_method)) for which, block in enumerate(blocks))
    return {block: area for block, area in areas if area is not None}
