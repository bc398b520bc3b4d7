"""Control vectors made of the rows of a file, or of a pair of vectors: what requests with features, ranks and
rotations read and write.

Requests repeat them, and a digest takes a hash over all numbers, so they are kept. What is made of a file goes with it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from weakref import WeakKeyDictionary

import numpy as np

from steer_engine.errors import SteeringRequestError
from steer_engine.vectors import ControlVector, RowSet, VectorMetadata

MAX_COSINE = 1 - 2.0**-16
"""Two directions with a larger |cosine| span no plane: their difference would be rounding."""


_FEATURES: WeakKeyDictionary[RowSet, dict[tuple[int, int], tuple[ControlVector, ControlVector]]] = WeakKeyDictionary()
"""By file, what `row_vectors` returned."""


def row_vectors(rows: RowSet, block: int, number: int) -> tuple[ControlVector, ControlVector]:
    """The two rows of a feature as vectors of one block."""
    known = _FEATURES.setdefault(rows, {})
    if (block, number) not in known:
        row = rows.row(block, number)
        # Copies: views would keep the whole file in memory.
        pair = (_vector({block: each.copy()}, rows.metadata) for each in (row.read, row.write))
        known[block, number] = (next(pair), next(pair))
    return known[block, number]


def _vector(directions: dict[int, np.ndarray], metadata: VectorMetadata) -> ControlVector:
    norms = {block: norm for block, norm in metadata.residual_norms.items() if block in directions}
    return ControlVector(directions=directions, metadata=VectorMetadata(residual_norms=norms))


_Ranks = tuple[tuple[ControlVector, ...], tuple[ControlVector, ...]]
_RANKS: WeakKeyDictionary[RowSet, _Ranks] = WeakKeyDictionary()
"""By file, what `rank_vectors` returned."""


def rank_vectors(rows: RowSet) -> _Ranks:
    """By rank, W_i - R_i and R_i at all blocks of a low-rank edit that have this rank."""
    if rows not in _RANKS:
        _RANKS[rows] = _maderank_vectors(rows)
    return _RANKS[rows]


def _maderank_vectors(rows: RowSet) -> _Ranks:
    def vectors(of_block: Callable[[int], np.ndarray]) -> tuple[ControlVector, ...]:
        most = max(map(rows.count, rows.blocks))
        return tuple(
            _vector({block: of_block(block)[i] for block in rows.blocks if i < rows.count(block)}, rows.metadata)
            for i in range(most)
        )

    return vectors(lambda block: rows.read[block] - rows.write[block]), vectors(lambda block: rows.write[block])


@lru_cache(maxsize=256)
def orthonormal_pair(
    vector: ControlVector, toward: ControlVector, blocks: tuple[int, ...], param: str
) -> tuple[ControlVector, ControlVector]:
    """Orthonormal vectors that span the plane, by Gram-Schmidt in float64."""
    first, second = {}, {}
    for block in blocks:
        u, w = unit_of(vector, block), unit_of(toward, block)
        along = float(u @ w)
        if abs(along) > MAX_COSINE:
            raise SteeringRequestError(
                f"The two vectors are parallel at block {block} (cosine {along:.6f}): they span no plane.",
                f"{param}.toward",
            )
        rest = w - along * u
        rest -= (rest @ u) * u  # once more: the first subtraction leaves rounding of the size of `along`
        first[block], second[block] = u.astype(np.float32), (rest / np.linalg.norm(rest)).astype(np.float32)
    return _vector(first, vector.metadata), _vector(second, vector.metadata)


def unit_of(vector: ControlVector, block: int) -> np.ndarray:
    """float64 [D]"""
    direction = vector.directions[block].astype(np.float64)
    unit: np.ndarray = direction / np.linalg.norm(direction)
    return unit
