"""The store: rows are made of vectors by content, rounded once."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

from steer_engine.engine.admission import MAX_LISTED
from steer_engine.engine.bank import Store
from steer_engine.program import RowKey
from steer_engine.vectors import ControlVector


def vector(*elements: float, block: int = 2) -> ControlVector:
    return ControlVector(directions={block: np.array(elements, dtype=np.float32)})


V, W, X = vector(3.0, 0.0, 4.0), vector(0.1, 1.0, -1.0), vector(-0.7, 1e-7, 3e7)


@pytest.fixture
def store() -> Store:
    store = Store()
    for held in (V, W, X):
        store.put(held)
    return store


def test_holds_vectors_by_digest(store: Store) -> None:
    assert store.digests() == sorted([V.digest, W.digest, X.digest])
    assert V.digest in store
    assert store.num_bytes == 3 * 3 * 4
    store.put(vector(3.0, 0.0, 4.0))
    assert store.num_bytes == 3 * 3 * 4
    store.drop(V.digest)
    store.drop(V.digest)
    store.drop("sha256:" + "0" * 64)
    assert V.digest not in store
    assert W.digest in store


def test_a_report_lists_a_limited_number_of_vectors(store: Store) -> None:
    for i in range(MAX_LISTED):
        store.put(vector(float(i + 1), 0.0, 0.0))
    assert len(store) == MAX_LISTED + 3
    assert len(store.digests()) == MAX_LISTED
    assert V.digest not in store.digests(), "the oldest one"


def test_a_single_vector_is_the_row_as_it_is(store: Store) -> None:
    row_D = store.row(RowKey(terms=((W.digest, 1.0),)), 2)
    assert row_D.dtype == np.float32
    assert np.array_equal(row_D, W.directions[2])


def test_a_unit_row(store: Store) -> None:
    row_D = store.row(RowKey(terms=((V.digest, 1.0),), unit=True), 2)
    assert np.array_equal(row_D, np.array([0.6, 0.0, 0.8], dtype=np.float32))


def test_a_weighted_sum_is_rounded_once(store: Store) -> None:
    weights = {V: 0.1, W: -2.5, X: 1 / 3}
    exact_D = sum(weight * held.directions[2].astype(np.float64) for held, weight in weights.items())
    for order in permutations(weights):
        row_D = store.row(RowKey(terms=tuple((held.digest, weights[held]) for held in order)), 2)
        assert np.array_equal(row_D, np.asarray(exact_D).astype(np.float32))


def test_a_unit_row_of_a_very_small_vector(store: Store) -> None:
    tiny = vector(3e-38, 0.0, 4e-38)
    store.put(tiny)
    row_D = store.row(RowKey(terms=((tiny.digest, 1.0),), unit=True), 2)
    assert np.linalg.norm(row_D.astype(np.float64)) == pytest.approx(1.0, rel=1e-6)


def test_what_is_not_held_makes_no_row(store: Store) -> None:
    with pytest.raises(KeyError):
        store.row(RowKey(terms=(("sha256:" + "0" * 64, 1.0),)), 2)
    with pytest.raises(KeyError):
        store.row(RowKey(terms=((V.digest, 1.0),)), 3)
