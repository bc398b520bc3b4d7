"""The first principal direction of more rows than memory holds: subspace iteration, a few passes over the rows.

Memory is O(D * k): never a [D, D] matrix, never all rows. Halko, Martinsson and Tropp, *Finding structure with
randomness* (2011), section 4.4, with a Rayleigh-Ritz step per pass.

Shape suffixes: N rows of a group, D width, K directions kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

KEPT = 8
"""Directions carried along. The error of the first shrinks per pass by eigenvalue KEPT + 1 over eigenvalue 1."""

MAX_PASSES = 60
SETTLED = 1e-13
"""The iteration ends when 1 - |cos| between the directions of two passes is below this: a cosine error far smaller than
what float32 rows have anyway."""


def top_direction(groups: Callable[[], Iterator[Array]], start_D: Array) -> tuple[Array, float]:
    """Top right singular vector of all rows `[D]`, and its squared singular value.

    groups: gives the rows `[N, D]`, group by group, in the same order each time it is called; sums are made in that
        order, so equal groups give equal bits.
    start_D: a first guess, such as the mean.
    """
    width = len(start_D)
    basis_DK = np.random.default_rng(0).normal(size=(width, min(KEPT, width)))
    basis_DK[:, 0] += start_D * np.sqrt(width)
    basis_DK, _ = np.linalg.qr(basis_DK)
    direction_D, value = basis_DK[:, 0], 0.0
    for _ in range(MAX_PASSES):
        image_DK = np.zeros_like(basis_DK)
        for rows_ND in groups():
            image_DK += rows_ND.T @ (rows_ND @ basis_DK)
        values_K, turn_KK = np.linalg.eigh(basis_DK.T @ image_DK)
        last, direction_D, value = direction_D, basis_DK @ turn_KK[:, -1], float(values_K[-1])
        if value <= 0.0:
            return np.zeros(width), 0.0
        if 1.0 - abs(float(direction_D @ last)) < SETTLED:
            break
        # In the turned basis the best direction comes first, and QR leaves it where it is.
        basis_DK, _ = np.linalg.qr(image_DK @ turn_KK[:, ::-1])
    return direction_D, value
