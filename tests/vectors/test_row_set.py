"""The row set: what it accepts, how rows are named, and its digest."""

from __future__ import annotations

import hashlib
import pickle
import struct
from typing import Any

import numpy as np
import pytest

from steer_engine.errors import ModelMismatchError, UnusableVectorError, VectorFileError
from steer_engine.vectors import RowSet, VectorMetadata
from steer_engine.vectors import row_set as module
from steer_engine.vectors.metadata import FittedCondition

READ = np.arange(12, dtype=np.float32).reshape(3, 4)
WRITE = READ[::-1] * 0.5


def features(**changes: Any) -> RowSet:
    """Three features of block 2, given out of order: 9, 2, 5."""
    fields: dict[str, Any] = {
        "kind": "features",
        "read": {2: READ},
        "write": {2: WRITE},
        "bias": {2: np.array([0.1, 0.2, 0.3], np.float32)},
        "threshold": {2: np.array([1.0, 2.0, 3.0], np.float32)},
        "labels": {2: {9: "nine", 2: "two"}},
        "indices": {2: np.array([9, 2, 5])},
        **changes,
    }
    return RowSet(**fields)


def low_rank(**changes: Any) -> RowSet:
    return RowSet(**{"kind": "low_rank", "read": {0: READ}, "write": {0: np.eye(4, dtype=np.float32)[:3]}, **changes})


def test_a_request_names_features_by_their_number_in_the_dictionary() -> None:
    rows = features()
    assert rows.numbers(2) == (2, 5, 9)
    row = rows.row(2, 9)
    np.testing.assert_array_equal(row.read, READ[0])
    np.testing.assert_array_equal(row.write, WRITE[0])
    assert (row.bias, row.threshold, row.label) == (pytest.approx(0.1), 1.0, "nine")
    assert rows.row(2, 5).label == ""
    assert (rows.count(2), rows.count(1), rows.blocks, rows.hidden_size, rows.num_rows) == (3, 0, (2,), 4, 3)


@pytest.mark.parametrize("index", [0, 3, 10, -1, 2**40, True, "2", None])
def test_a_row_that_does_not_exist(index: Any) -> None:
    with pytest.raises(VectorFileError, match=r"Block 2 has no feature .*; it has 2, 5, 9\."):
        features().row(2, index)


def test_low_rank_rows_are_numbered_from_zero_and_have_a_bias() -> None:
    rows = low_rank()
    assert rows.row(0, 2).bias == 0.0
    assert rows.row(0, 2).threshold is None
    with pytest.raises(VectorFileError, match="Block 0 has no row 3; it has 0, 1, 2"):
        rows.row(0, 3)
    with pytest.raises(VectorFileError, match="no rows for block 7; there are for"):
        rows.row(7, 0)


def test_the_order_in_which_features_are_given_does_not_matter() -> None:
    turned = features(
        read={2: READ[::-1]},
        write={2: WRITE[::-1]},
        bias={2: np.array([0.3, 0.2, 0.1], np.float32)},
        threshold={2: np.array([3.0, 2.0, 1.0], np.float32)},
        indices={2: np.array([5, 2, 9])},
    )
    assert turned == features()
    assert hash(turned) == hash(features())


@pytest.mark.parametrize(
    "changes",
    [
        {"read": {2: READ + 1}},
        {"write": {2: WRITE + 1}},
        {"bias": {}},
        {"threshold": {}},
        {"indices": {}, "labels": {}},
        {"metadata": VectorMetadata(residual_norms={2: 3.0})},
    ],
)
def test_all_that_changes_the_effect_changes_the_digest(changes: dict[str, Any]) -> None:
    assert features(**changes).digest != features().digest


def test_labels_and_provenance_do_not_change_the_digest() -> None:
    other = features(labels={}, metadata=VectorMetadata(model="m", notes="n", residual_norms={7: 3.0}))
    assert other.digest == features().digest


def test_the_digest_is_that_of_the_page() -> None:
    rows = features(metadata=VectorMetadata(residual_norms={2: 8.0}))
    parts = [b"steer-engine row set v1\nfeatures\n", struct.pack("<4I", 2, 3, 4, 1)]
    order = [1, 2, 0]
    parts += [READ[order].astype("<f4").tobytes(), WRITE[order].astype("<f4").tobytes()]
    parts += [struct.pack("<3f", 0.2, 0.3, 0.1), struct.pack("<3f", 2, 3, 1), struct.pack("<3q", 2, 5, 9)]
    parts += [struct.pack("<Id", 2, 8.0)]
    assert rows.digest == "sha256:" + hashlib.sha256(b"".join(parts)).hexdigest()


def test_arrays_are_read_only_copies() -> None:
    given = READ.copy()
    rows = features(read={2: given})
    given[:] = 0
    assert rows.read[2].any()
    for mapping in (rows.read, rows.write, rows.bias, rows.threshold, rows.indices):
        with pytest.raises(ValueError, match="read-only"):
            mapping[2][0] = 1


def test_it_survives_pickling() -> None:
    rows = features(metadata=VectorMetadata(notes="n"))
    back = pickle.loads(pickle.dumps(rows))
    assert back == rows
    assert back.labels == rows.labels
    assert back.metadata == rows.metadata


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"kind": "other"}, "not a kind of row set"),
        ({"read": {}, "write": {}}, "at least one"),
        ({"write": {3: WRITE}}, "for the same blocks"),
        ({"read": {-1: READ}, "write": {-1: WRITE}}, "not a block number"),
        ({"read": {True: READ}, "write": {True: WRITE}}, "not a block number"),
        ({"bias": {3: np.zeros(3, np.float32)}}, "bias for block 3, which has no rows"),
        ({"write": {2: WRITE[:2]}}, r"write of block 2 has shape \[2, 4\]; \[3, 4\] is needed"),
        ({"bias": {2: np.zeros(2, np.float32)}}, r"bias of block 2 has shape \[2\]"),
        ({"threshold": {2: np.zeros((3, 1), np.float32)}}, "threshold of block 2 has shape"),
        ({"read": {2: READ.astype(int)}}, "floating point is needed"),
        ({"read": {2: READ[0]}}, "not usable"),
        ({"read": {2: np.zeros((0, 4), np.float32)}}, "not usable"),
        ({"indices": {2: np.array([1, 1, 2])}}, "same feature twice"),
        ({"indices": {2: np.array([-1, 1, 2])}}, "not within 0"),
        ({"indices": {2: np.array([0.5, 1, 2])}}, "whole numbers"),
        ({"indices": {2: np.array([1, 2])}}, "one per row"),
        ({"labels": {2: {3: "three"}}}, "label for row 3 of block 2, which it does not have"),
        ({"labels": {2: {9: ""}}}, "1 to 512 characters"),
        ({"labels": {2: {9: "x" * 513}}}, "1 to 512 characters"),
        ({"metadata": VectorMetadata(hidden_size=5)}, "hidden size 5 but the rows have 4"),
        ({"metadata": VectorMetadata(num_blocks=2)}, "the model has 2 blocks"),
        (
            {
                "metadata": VectorMetadata(
                    condition=FittedCondition(blocks=(2,), measure="dot", at="max_prompt", above=1)
                )
            },
            "no condition and no probe",
        ),
    ],
)
def test_unusable_parts_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(VectorFileError, match=message):
        features(**changes)


@pytest.mark.parametrize("name", ["read", "write", "bias", "threshold"])
@pytest.mark.parametrize("value", [np.nan, np.inf, 1e39])
def test_numbers_that_are_not_finite_are_refused(name: str, value: float) -> None:
    shape = (3, 4) if name in ("read", "write") else (3,)
    array = np.zeros(shape, np.float64)
    array.flat[-1] = value
    with pytest.raises(UnusableVectorError, match=f"The {name} of block 2 has values that are not finite"):
        features(**{name: {2: array}})


def test_low_rank_edits_have_neither_thresholds_nor_indices() -> None:
    for name in ("threshold", "indices"):
        with pytest.raises(VectorFileError, match="belong to features"):
            low_rank(**{name: {0: np.zeros(3, np.float32)}})
    with pytest.raises(VectorFileError, match="rank 5, above the hidden size 4"):
        low_rank(read={0: np.zeros((5, 4), np.float32)}, write={0: np.zeros((5, 4), np.float32)})


def test_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = np.broadcast_to(np.float32(0), (module.MAX_ROWS + 1, 4))
    with pytest.raises(VectorFileError, match="k up to 4096"):
        RowSet(kind="features", read={0: wide}, write={0: wide})
    monkeypatch.setattr(module, "MAX_ROW_SET_BYTES", 143)
    with pytest.raises(VectorFileError, match="need 144 bytes, at most 143"):
        features()
    monkeypatch.undo()
    monkeypatch.setattr(module, "MAX_LABEL_CHARS", 6)
    with pytest.raises(VectorFileError, match="7 characters together"):
        features()


def test_orthonormality() -> None:
    assert low_rank().orthonormality_error(0) == 0.0
    skewed = np.eye(4, dtype=np.float32)[:3] * 1.5
    assert low_rank(write={0: skewed}).orthonormality_error(0) == pytest.approx(1.25)


def test_it_fits_a_model_or_says_why_not() -> None:
    rows = features(metadata=VectorMetadata(model="m"))
    rows.check(hidden_size=4, num_blocks=3)
    with pytest.raises(ModelMismatchError, match=r"hidden size 4 but the model has 5; it was made for 'm'"):
        rows.check(hidden_size=5, num_blocks=3)
    with pytest.raises(ModelMismatchError, match="rows for block 2 but the model's last is 1"):
        rows.check(hidden_size=4, num_blocks=2)


def test_restricted_to_some_blocks() -> None:
    both = features(read={2: READ, 4: READ}, write={2: WRITE, 4: WRITE})
    assert both.restrict([2, 9]) == features()
    assert both.restrict([4]).threshold == {}
    with pytest.raises(VectorFileError, match=r"None of the blocks \[3\] has rows"):
        both.restrict([3])
