"""The vectors that an engine holds, whole, in host memory: one store per worker."""

from __future__ import annotations

import numpy as np

from steer_engine.program import RowKey
from steer_engine.vectors import ControlVector


class Store:
    """Control vectors by digest. What is not in here cannot be steered with."""

    def __init__(self) -> None:
        self._vectors: dict[str, ControlVector] = {}

    def __contains__(self, digest: str) -> bool:
        return digest in self._vectors

    def digests(self) -> list[str]:
        return sorted(self._vectors)

    @property
    def num_bytes(self) -> int:
        return sum(row.nbytes for vector in self._vectors.values() for row in vector.directions.values())

    def put(self, vector: ControlVector) -> None:
        self._vectors[vector.digest] = vector

    def drop(self, digest: str) -> None:
        self._vectors.pop(digest, None)

    def row(self, key: RowKey, block: int) -> np.ndarray:
        """float32 [D]: the weighted sum of the key's vectors at `block`, or its unit direction."""
        total_D: np.ndarray | None = None
        for digest, weight in key.terms:
            direction_D = self._vectors[digest].directions[block]
            # float64 sums: the order of the terms must not show in float32.
            term_D = direction_D.astype(np.float64) * weight
            total_D = term_D if total_D is None else total_D + term_D
        assert total_D is not None, "a row has at least one term"
        if key.unit:
            total_D = total_D / np.linalg.norm(total_D)
        return total_D.astype(np.float32)
