"""The control vector: one direction of the residual stream per block."""

from __future__ import annotations

import hashlib
import math
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from steer_engine.errors import UnusableVectorError, VectorFileError
from steer_engine.fields import shown
from steer_engine.site import Site
from steer_engine.vectors.metadata import MAX_BLOCKS, MAX_HIDDEN_SIZE, VectorMetadata, require_fit

Direction = npt.NDArray[np.float32]

DIGEST_TAG = b"steer-engine control vector v1\n"
"""Start of the digested bytes. It keeps digests of vectors apart from digests of anything else."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ControlVector:
    """Directions per block. The direction of block l is added to the output of block l, counted from 0.

    Equality and hash depend on the content (the digest), not on names or provenance.

    directions: block -> float32 `[hidden_size]`, finite; stored as read-only copies. Not every block of the model needs
        a direction. A direction of zeros has no effect.

    Raises:
        VectorFileError: the directions are not usable, or contradict the metadata.
    """

    directions: Mapping[int, Direction]
    metadata: VectorMetadata = field(default_factory=VectorMetadata)

    def __post_init__(self) -> None:
        directions = _checked_directions(self.directions)
        hidden_size = next(iter(directions.values())).shape[0]
        declared = self.metadata.hidden_size
        if declared is not None and declared != hidden_size:
            raise VectorFileError(f"The metadata says hidden size {declared} but the directions have {hidden_size}.")
        num_blocks = self.metadata.num_blocks
        if num_blocks is not None and max(directions) >= num_blocks:
            raise VectorFileError(
                f"There is a direction for block {max(directions)}, but the metadata says that the model has "
                f"{num_blocks} blocks (0 to {num_blocks - 1})."
            )
        metadata = self.metadata.model_copy(update={"hidden_size": hidden_size}, deep=True)
        object.__setattr__(self, "directions", MappingProxyType(directions))
        object.__setattr__(self, "metadata", metadata)

    @cached_property
    def blocks(self) -> tuple[int, ...]:
        """Blocks that have a direction, ascending."""
        return tuple(self.directions)

    @cached_property
    def hidden_size(self) -> int:
        """D, the width of the residual stream."""
        return int(next(iter(self.directions.values())).shape[0])

    @property
    def num_bytes(self) -> int:
        """Bytes of the directions."""
        return len(self.directions) * self.hidden_size * 4

    @cached_property
    def norms(self) -> Mapping[int, float]:
        """Block -> Euclidean norm of its direction, computed in float64."""
        norms = {block: float(np.linalg.norm(v.astype(np.float64))) for block, v in self.directions.items()}
        return MappingProxyType(norms)

    @cached_property
    def norm_range(self) -> tuple[float, float]:
        """The smallest norm of a direction that is not zero (infinity if all are), and the largest norm."""
        return min(filter(None, self.norms.values()), default=math.inf), max(self.norms.values())

    @property
    def is_zero(self) -> bool:
        """Whether it has no effect at all."""
        return not any(self.norms.values())

    @cached_property
    def digest(self) -> str:
        """`"sha256:<64 hex>"` of the content: directions, residual norms and the site, never names.

        Digested bytes: the tag; then per block, ascending, `<u4 block, u4 D` and D little-endian float32; then per
        residual norm of a block that has a direction, ascending, `<u4 block, f8 norm`; then the name of the site if it
        is not "block".
        """
        sha = hashlib.sha256(DIGEST_TAG)
        for block, direction in self.directions.items():
            sha.update(struct.pack("<II", block, direction.shape[0]))
            sha.update(direction.astype("<f4", copy=False).tobytes())
        for block, norm in sorted(self.metadata.residual_norms.items()):
            if block in self.directions:
                sha.update(struct.pack("<Id", block, norm))
        if self.metadata.site is not Site.BLOCK:
            sha.update(self.metadata.site.value.encode())
        return f"sha256:{sha.hexdigest()}"

    def check(self, *, hidden_size: int, num_blocks: int) -> None:
        """Raise ModelMismatchError unless the vector fits a model of this width and depth."""
        require_fit(
            "vector", "a direction", self.hidden_size, self.blocks[-1], self.metadata,
            hidden_size=hidden_size, num_blocks=num_blocks,
        )  # fmt: skip

    def restrict(self, blocks: Iterable[int]) -> ControlVector:
        """The same vector with directions at the given blocks only. Raises VectorFileError if none is left."""
        wanted = set(blocks)
        kept = {block: v for block, v in self.directions.items() if block in wanted}
        if not kept:
            raise VectorFileError(f"None of the blocks {sorted(wanted)} has a direction; it has {list(self.blocks)}.")
        condition, probe = self.metadata.condition, self.metadata.probe
        lost = condition is not None and not set(condition.blocks) <= kept.keys()
        fitted = {"condition": None if lost else condition, "probe": probe and probe.at_blocks(kept)}
        return ControlVector(directions=kept, metadata=self.metadata.model_copy(update=fitted))

    def with_metadata(self, **fields: Any) -> ControlVector:
        """The same directions with some metadata fields replaced (validated)."""
        metadata = VectorMetadata.checked({**self.metadata.model_dump(), **fields})
        return ControlVector(directions=self.directions, metadata=metadata)

    @property
    def _unfitted(self) -> VectorMetadata:
        """The metadata without condition and probe: they were fitted for other directions than those of the result."""
        return self.metadata.model_copy(update={"condition": None, "probe": None})

    def __add__(self, other: ControlVector) -> ControlVector:
        if not isinstance(other, ControlVector):
            return NotImplemented
        if self.hidden_size != other.hidden_size:
            raise VectorFileError(f"Hidden sizes {self.hidden_size} and {other.hidden_size} cannot be added.")
        if (mine := self.metadata.site) is not (theirs := other.metadata.site):
            raise VectorFileError(f"Vectors of the sites {mine.value!r} and {theirs.value!r} cannot be added.")
        # A block without a direction counts as zero.
        summed = {
            block: _plus(self.directions.get(block), other.directions.get(block))
            for block in self.directions.keys() | other.directions.keys()
        }
        return ControlVector(directions=summed, metadata=self.metadata.joined(other.metadata))

    def __neg__(self) -> ControlVector:
        return ControlVector(
            directions={b: np.negative(v) for b, v in self.directions.items()}, metadata=self._unfitted
        )

    def __sub__(self, other: ControlVector) -> ControlVector:
        return self + (-other) if isinstance(other, ControlVector) else NotImplemented

    def __mul__(self, scale: float) -> ControlVector:
        if isinstance(scale, bool) or not isinstance(scale, int | float | np.floating | np.integer):
            return NotImplemented
        with np.errstate(over="ignore", invalid="ignore"):  # the constructor rejects an overflow
            scaled = {b: (v * np.float64(scale)).astype(np.float32) for b, v in self.directions.items()}
        return ControlVector(directions=scaled, metadata=self._unfitted)

    __rmul__ = __mul__

    def __truediv__(self, divisor: float) -> ControlVector:
        if isinstance(divisor, bool) or not isinstance(divisor, int | float | np.floating | np.integer):
            return NotImplemented
        if divisor == 0:
            raise ZeroDivisionError("A control vector cannot be divided by 0.")
        with np.errstate(over="ignore", invalid="ignore"):
            scaled = {b: (v / np.float64(divisor)).astype(np.float32) for b, v in self.directions.items()}
        return ControlVector(directions=scaled, metadata=self._unfitted)

    def __eq__(self, other: object) -> bool:
        return self.digest == other.digest if isinstance(other, ControlVector) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.digest)

    def __reduce__(self) -> tuple[Any, ...]:
        # A mapping proxy cannot be pickled; Ray and spawned processes pickle vectors.
        return _rebuild, (dict(self.directions), self.metadata)

    def __repr__(self) -> str:
        return (
            f"ControlVector({len(self.blocks)} blocks {self.blocks[0]}..{self.blocks[-1]}, "
            f"hidden_size={self.hidden_size}, {self.digest[:19]})"
        )


def _rebuild(directions: dict[int, Direction], metadata: VectorMetadata) -> ControlVector:
    return ControlVector(directions=directions, metadata=metadata)


def _plus(a: Direction | None, b: Direction | None) -> Direction:
    if a is None or b is None:
        present = b if a is None else a
        assert present is not None
        return present
    with np.errstate(over="ignore"):
        return np.add(a, b)


def _checked_directions(given: Mapping[int, Any]) -> dict[int, Direction]:
    """Read-only float32 copies, by ascending block. Raises VectorFileError for an unusable direction."""
    if not given:
        raise VectorFileError("A control vector needs a direction for at least one block; none was given.")
    for block in given:
        if isinstance(block, bool) or not isinstance(block, int | np.integer) or not 0 <= block < MAX_BLOCKS:
            raise VectorFileError(f"Block {shown(block)} is not a block number; valid are 0 to {MAX_BLOCKS - 1}.")
    checked: dict[int, Direction] = {}
    for block in sorted(given):
        array = np.asarray(given[block])
        if array.dtype.kind != "f":
            raise VectorFileError(f"The direction of block {block} has dtype {array.dtype}; floating point is needed.")
        if array.ndim != 1 or not 1 <= array.shape[0] <= MAX_HIDDEN_SIZE:
            raise VectorFileError(
                f"The direction of block {block} has shape {list(array.shape)}; "
                f"[D] with D from 1 to {MAX_HIDDEN_SIZE} is needed."
            )
        if checked and array.shape[0] != (width := next(iter(checked.values())).shape[0]):
            raise VectorFileError(f"Hidden sizes differ: {width} before block {block}, {array.shape[0]} at it.")
        with np.errstate(over="ignore"):
            direction = np.array(array, dtype=np.float32, order="C")
        if not np.isfinite(direction).all():
            raise UnusableVectorError(f"The direction of block {block} has values that are not finite in float32.")
        direction.flags.writeable = False
        checked[int(block)] = direction
    return checked
