"""Methods: from rows of the residual stream to a direction. NumPy in float64, no engine.

The formulas are those of the literature: `diffmean` is that of CAA (Rimsky et al. 2024) and the contrastive vector of
Højer et al. (ICLR 2025), `pca_centred` their PCA and repeng's `pca_diff`, `pca` repeng's `pca_center`, `lat` that of
Zou et al. (2023).

Every direction is signed so that positives project higher, and is as long as the difference of the class means: scale 1
moves the stream by the same distance with every method. Only `mean` is neither signed nor scaled.

Shape suffixes: N texts, L blocks, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from steer_engine.derive.moments import Array, Moments
from steer_engine.errors import DerivationError

LAT_SEED = 0
"""Seed of the random pairing in `lat`: equal data give equal vectors."""

LOGISTIC_L2 = 1.0
"""Strength of the ridge on standardised rows, as scikit-learn's C = 1."""

LDA_SHRINKAGE = 0.1
"""Ridge of the within-class scatter, as a share of its mean eigenvalue."""

KEPT = 8
"""Directions that `top_direction` iterates on. The error of the first shrinks per pass by the ratio of eigenvalue
KEPT + 1 to eigenvalue 1."""

MAX_PASSES = 60

SETTLED = 1e-13
"""`top_direction` stops when 1 - |cos| between the directions of two passes is below this: far below the rounding of
float32 rows."""


def mean(positive: Moments, negative: Moments) -> Array:
    """mu+. `[L, D]`"""
    return positive.mean_LD


def diffmean(positive: Moments, negative: Moments) -> Array:
    """mu+ - mu-. `[L, D]`"""
    return positive.mean_LD - negative.mean_LD


def mean_centred(target: Moments, background: Moments) -> Array:
    """mu_target - mu_background: the formula of `diffmean`, with everyday texts as negatives. `[L, D]`"""
    return target.mean_LD - background.mean_LD


def mean_difference(positive_ND: Array, negative_ND: Array) -> Array:
    """`diffmean` from rows. `[D]`"""
    difference_D: Array = positive_ND.mean(axis=0) - negative_ND.mean(axis=0)
    return difference_D


def pca(positive_ND: Array, negative_ND: Array) -> Array:
    """Top right singular vector of the paired differences, not centred. `[D]`"""
    return _top_direction(_differences(positive_ND, negative_ND), positive_ND, negative_ND)


def pca_centred(positive_ND: Array, negative_ND: Array) -> Array:
    """First principal component of the paired differences. `[D]`"""
    differences_ND = _differences(positive_ND, negative_ND)
    return _top_direction(differences_ND - differences_ND.mean(axis=0), positive_ND, negative_ND)


def lat(positive_ND: Array, negative_ND: Array) -> Array:
    """First principal component of the differences of randomly paired texts of both classes. `[D]`"""
    rows_ND = np.concatenate([positive_ND, negative_ND])
    order = np.random.default_rng(LAT_SEED).permutation(len(rows_ND))
    half = len(order) // 2
    differences_ND = rows_ND[order[:half]] - rows_ND[order[half : 2 * half]]
    return _top_direction(differences_ND - differences_ND.mean(axis=0), positive_ND, negative_ND)


def logistic(positive_ND: Array, negative_ND: Array) -> Array:
    """Weights of a ridge-penalised logistic regression on standardised rows, in the rows' own units. `[D]`

    Solved in the span of the rows (N unknowns instead of D) with scipy's L-BFGS.
    """
    from scipy.optimize import minimize

    rows_ND = np.concatenate([positive_ND, negative_ND])
    label_N = np.concatenate([np.ones(len(positive_ND)), -np.ones(len(negative_ND))])
    spread_D = rows_ND.std(axis=0)
    spread_D[spread_D == 0.0] = 1.0
    scaled_ND = (rows_ND - rows_ND.mean(axis=0)) / spread_D
    # scaled = basis @ span. The optimal weights lie in the row span, and an orthonormal basis preserves |w|.
    basis_NK, values_K, span_KD = np.linalg.svd(scaled_ND, full_matrices=False)
    features_NK = basis_NK * values_K

    def loss(theta: Array) -> tuple[float, Array]:
        weight_K, bias = theta[:-1], theta[-1]
        margin_N = label_N * (features_NK @ weight_K + bias)
        slope_N = -label_N * np.exp(-np.logaddexp(0.0, margin_N))
        value = np.logaddexp(0.0, -margin_N).sum() + 0.5 * LOGISTIC_L2 * weight_K @ weight_K
        return float(value), np.append(features_NK.T @ slope_N + LOGISTIC_L2 * weight_K, slope_N.sum())

    found = minimize(loss, np.zeros(len(values_K) + 1), jac=True, method="L-BFGS-B", options={"maxiter": 1000})
    return _signed_and_scaled((found.x[:-1] @ span_KD) / spread_D, positive_ND, negative_ND)


def lda(positive_ND: Array, negative_ND: Array) -> Array:
    """(S_w + lambda I)^-1 (mu+ - mu-), with lambda a tenth of the mean eigenvalue of S_w. `[D]`

    With fewer rows than D, solved in the span of the rows with the Woodbury identity: no `[D, D]` matrix is needed.
    """
    gap_D = positive_ND.mean(axis=0) - negative_ND.mean(axis=0)
    within_ND = np.concatenate([positive_ND - positive_ND.mean(axis=0), negative_ND - negative_ND.mean(axis=0)])
    within_ND = within_ND / np.sqrt(len(within_ND))
    ridge = LDA_SHRINKAGE * float((within_ND**2).sum()) / within_ND.shape[1]
    if ridge == 0.0:
        return _signed_and_scaled(gap_D, positive_ND, negative_ND)
    num_rows, width = within_ND.shape
    if num_rows > width:
        scatter_DD = within_ND.T @ within_ND + ridge * np.eye(width)
        return _signed_and_scaled(np.linalg.solve(scatter_DD, gap_D), positive_ND, negative_ND)
    gram_NN = within_ND @ within_ND.T
    inner_N = np.linalg.solve(gram_NN + ridge * np.eye(len(gram_NN)), within_ND @ gap_D)
    return _signed_and_scaled((gap_D - within_ND.T @ inner_N) / ridge, positive_ND, negative_ND)


FROM_MOMENTS: dict[str, Callable[[Moments, Moments], Array]] = {
    "diffmean": diffmean,
    "mean": mean,
    "mean_centred": mean_centred,
}
"""Methods that need only sums: constant memory for any number of texts."""

FROM_ROWS: dict[str, Callable[[Array, Array], Array]] = {
    "pca": pca,
    "pca_centred": pca_centred,
    "lat": lat,
    "logistic": logistic,
    "lda": lda,
}
"""Methods that need the rows of a block."""

PAIRED = ("pca", "pca_centred")
"""Methods that need pairs. They can also be fitted in passes over the rows: see `top_direction`."""

METHODS = (*FROM_MOMENTS, *FROM_ROWS)


def require_method(name: str) -> str:
    """The name itself. A DerivationError lists the valid names."""
    if name not in METHODS:
        raise DerivationError(f"There is no method {name[:64]!r}; valid are {', '.join(METHODS)}.")
    return name


def signed_and_scaled(direction_D: Array, gap_D: Array) -> Array:
    """The direction with the sign of `gap_D` and its length. gap_D: difference of the class means.

    A direction orthogonal to `gap_D` keeps its sign. A zero direction stays zero.
    """
    length = float(np.linalg.norm(direction_D))
    if length == 0.0:
        return direction_D
    sign = -1.0 if direction_D @ gap_D < 0.0 else 1.0
    return direction_D * (sign * float(np.linalg.norm(gap_D)) / length)


def top_direction(groups: Callable[[], Iterator[Array]], start_D: Array) -> tuple[Array, float]:
    """Top right singular vector of all rows `[D]`, and its squared singular value, by subspace iteration.

    groups: returns the rows `[N, D]`, group by group, in the same order at each call. Sums are added in that order, so
        equal groups give equal bits.
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
        values_K, rotation_KK = np.linalg.eigh(basis_DK.T @ image_DK)
        last, direction_D, value = direction_D, basis_DK @ rotation_KK[:, -1], float(values_K[-1])
        if value <= 0.0:
            return np.zeros(width), 0.0
        if 1.0 - abs(float(direction_D @ last)) < SETTLED:
            break
        # In the rotated basis the best direction comes first, and QR preserves it.
        basis_DK, _ = np.linalg.qr(image_DK @ rotation_KK[:, ::-1])
    return direction_D, value


def _differences(positive_ND: Array, negative_ND: Array) -> Array:
    assert positive_ND.shape == negative_ND.shape, "paired methods need one negative per positive"
    return positive_ND - negative_ND


def _top_direction(rows_ND: Array, positive_ND: Array, negative_ND: Array) -> Array:
    """Right singular vector of the largest singular value, by the smaller of the two Gram matrices."""
    num_rows, width = rows_ND.shape
    if num_rows < width:
        _, vectors_NN = np.linalg.eigh(rows_ND @ rows_ND.T)
        direction_D = rows_ND.T @ vectors_NN[:, -1]
    else:
        _, vectors_DD = np.linalg.eigh(rows_ND.T @ rows_ND)
        direction_D = vectors_DD[:, -1]
    return _signed_and_scaled(direction_D, positive_ND, negative_ND)


def _signed_and_scaled(direction_D: Array, positive_ND: Array, negative_ND: Array) -> Array:
    return signed_and_scaled(direction_D, positive_ND.mean(axis=0) - negative_ND.mean(axis=0))
