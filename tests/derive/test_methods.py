"""Methods against scikit-learn and NumPy."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from steer_engine.derive import methods
from steer_engine.derive.moments import Moments, summarise
from steer_engine.errors import DerivationError

Array = np.ndarray


def cosine(a: Array, b: Array) -> float:
    return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def rows(num_pairs: int = 40, width: int = 12, seed: int = 0, spread: float = 0.5) -> tuple[Array, Array]:
    """Positives and negatives around a common part, apart along one direction, with one loud nuisance direction."""
    rng = np.random.default_rng(seed)
    concept, nuisance = np.linalg.qr(rng.normal(size=(width, 2)))[0].T
    base = rng.normal(size=(num_pairs, width)) + 5 * rng.normal(size=(num_pairs, 1)) * nuisance
    gap = (3 + rng.normal(size=(num_pairs, 1))) * concept
    noise = spread * rng.normal(size=(num_pairs, width))
    return base + gap / 2 + noise + 1.0, base - gap / 2 + 1.0


def moments(rows_ND: Array) -> Moments:
    return Moments.of([summarise(row[None, None].astype(np.float32), skip_first=False) for row in rows_ND])


def test_methods_of_moments_are_means() -> None:
    positive, negative = (part.astype(np.float32).astype(np.float64) for part in rows())
    p, n = moments(positive), moments(negative)
    assert np.allclose(methods.mean(p, n)[0], positive.mean(axis=0), rtol=1e-14)
    assert np.allclose(methods.diffmean(p, n)[0], (positive - negative).mean(axis=0), rtol=1e-12)
    assert np.array_equal(methods.mean_centred(p, n), methods.diffmean(p, n))


def svd_top(matrix: Array) -> Array:
    return np.linalg.svd(matrix, full_matrices=False)[2][0]


@pytest.mark.parametrize("shape", [(40, 12), (10, 64)], ids=["tall", "wide"])
def test_pca_is_the_top_right_singular_vector_as_repeng_computes_it(shape: tuple[int, int]) -> None:
    from sklearn.decomposition import PCA

    positive, negative = rows(*shape)
    # repeng's pca_diff: PCA (which centres) of the differences; its pca_center: of both sides minus the pair's centre.
    expected = PCA(n_components=1).fit(positive - negative).components_[0]
    assert abs(cosine(methods.pca_centred(positive, negative), expected)) > 1 - 1e-12
    centre = (positive + negative) / 2
    expected = PCA(n_components=1).fit(np.concatenate([positive - centre, negative - centre])).components_[0]
    assert abs(cosine(methods.pca(positive, negative), expected)) > 1 - 1e-12
    assert abs(cosine(methods.pca(positive, negative), svd_top(positive - negative))) > 1 - 1e-12


def test_logistic_equals_that_of_scikit_learn() -> None:
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    positive, negative = rows(30, 80)
    both = np.concatenate([positive, negative])
    scaler = StandardScaler().fit(both)
    fitted = LogisticRegression(C=1.0, tol=1e-10, max_iter=10_000).fit(
        scaler.transform(both), np.repeat([1, 0], len(positive))
    )
    assert cosine(methods.logistic(positive, negative), fitted.coef_[0] / scaler.scale_) > 1 - 1e-6


@pytest.mark.parametrize("shape", [(40, 12), (10, 64)], ids=["tall", "wide"])
def test_lda_is_the_ridged_inverse(shape: tuple[int, int]) -> None:
    positive, negative = rows(*shape)
    within = np.concatenate([positive - positive.mean(axis=0), negative - negative.mean(axis=0)])
    scatter = within.T @ within / len(within)
    ridge = methods.LDA_SHRINKAGE * np.trace(scatter) / len(scatter)
    expected = np.linalg.solve(scatter + ridge * np.eye(len(scatter)), positive.mean(axis=0) - negative.mean(axis=0))
    assert cosine(methods.lda(positive, negative), expected) > 1 - 1e-12


def test_lat_finds_the_loudest_direction_between_random_texts() -> None:
    positive, negative = rows(200, 12)
    assert np.array_equal(methods.lat(positive, negative), methods.lat(positive, negative))
    both = np.concatenate([positive, negative])
    assert abs(cosine(methods.lat(positive, negative), svd_top(both - both.mean(axis=0)))) > 0.98


ROW_METHODS = methods.FROM_ROWS.items()


@pytest.mark.parametrize(("name", "method"), ROW_METHODS)
@pytest.mark.parametrize("seed", range(4))
def test_positives_project_higher_and_length_is_that_of_the_mean_difference(
    name: str, method: Callable[[Array, Array], Array], seed: int
) -> None:
    positive, negative = rows(seed=seed)
    direction = method(positive, negative)
    gap = positive.mean(axis=0) - negative.mean(axis=0)
    assert direction @ gap > 0
    assert np.linalg.norm(direction) == pytest.approx(np.linalg.norm(gap), rel=1e-12)
    # Exchanging the sides turns the direction round. (`lat` then draws other pairs: only its sign is checked.)
    turned = method(negative, positive)
    assert turned @ -gap > 0
    if name != "lat":
        assert cosine(turned, direction) == pytest.approx(-1.0, abs=1e-6)


@pytest.mark.parametrize(("name", "method"), ROW_METHODS)
def test_no_difference_gives_zero(name: str, method: Callable[[Array, Array], Array]) -> None:
    same = np.ones((4, 3))
    assert np.linalg.norm(method(same, same)) == 0.0


@pytest.mark.parametrize("name", ["pca", "logistic", "lda"])
def test_methods_find_the_concept_under_the_nuisance(name: str) -> None:
    positive, negative = rows(400, 12, spread=0.1)
    concept = np.linalg.qr(np.random.default_rng(0).normal(size=(12, 2)))[0].T[0]
    assert abs(cosine(methods.FROM_ROWS[name](positive, negative), concept)) > 0.99


def test_unknown_methods_are_refused_with_the_list() -> None:
    assert methods.require_method("diffmean") == "diffmean"
    with pytest.raises(DerivationError, match="no method 'caa'; valid are diffmean, mean, mean_centred, pca"):
        methods.require_method("caa")


def spectrum(num: int, width: int, ratio: float) -> np.ndarray:
    """Rows with a first eigenvalue that is `ratio` times the second, and a slow decay behind them."""
    rng = np.random.default_rng(1)
    rank = min(num, width)
    left, _ = np.linalg.qr(rng.normal(size=(num, rank)))
    right, _ = np.linalg.qr(rng.normal(size=(width, rank)))
    values = np.sqrt(np.concatenate([[ratio], np.linspace(1.0, 0.2, rank - 1)]))
    return (left * values) @ right.T


@pytest.mark.parametrize(("num", "width"), [(300, 40), (30, 400), (5, 3), (3, 5), (1, 4)])
def test_top_direction_is_the_first_singular_vector(num: int, width: int) -> None:
    matrix = spectrum(num, width, 1.1)
    _, values, vectors = np.linalg.svd(matrix, full_matrices=False)
    found, value = methods.top_direction(lambda: iter(np.array_split(matrix, 3)), np.zeros(width))
    assert abs(found @ vectors[0]) > 1 - 1e-7
    assert value == pytest.approx(values[0] ** 2, rel=1e-9)
    assert np.linalg.norm(found) == pytest.approx(1.0, rel=1e-12)


def test_top_direction_takes_a_few_passes() -> None:
    matrix = spectrum(500, 60, 4.0)
    passes = 0

    def groups() -> Iterator[np.ndarray]:
        nonlocal passes
        passes += 1
        yield from np.array_split(matrix, 7)

    methods.top_direction(groups, np.zeros(60))
    assert 2 <= passes < 20 < methods.MAX_PASSES


def test_zero_rows_have_no_direction() -> None:
    found, value = methods.top_direction(lambda: iter([np.zeros((4, 6))]), np.zeros(6))
    assert value == 0.0
    assert not found.any()
