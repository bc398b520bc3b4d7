"""Vectors that should not help: if one does, the gain of the vector under test is not about what it was made of."""

from __future__ import annotations

import numpy as np

from steer_engine.vectors.control_vector import ControlVector


def random_like(vector: ControlVector, *, seed: int) -> ControlVector:
    """A random direction at every block of the vector, as long as the vector's there."""
    random = np.random.default_rng(seed)
    rows = {block: random.standard_normal(vector.hidden_size) for block in vector.blocks}
    return as_long_as(vector, rows, method="control: random direction")


def as_long_as(vector: ControlVector, rows: dict[int, np.ndarray], *, method: str) -> ControlVector:
    """Other directions at the blocks of a vector, each as long as the vector's; a zero one stays zero."""
    directions = {}
    for block in vector.blocks:
        row = np.asarray(rows[block], dtype=np.float64)
        length = float(np.linalg.norm(row))
        directions[block] = (row * (vector.norms[block] / length if length else 0.0)).astype(np.float32)
    return ControlVector(directions=directions, metadata=vector.metadata.model_copy(update={"method": method}))
