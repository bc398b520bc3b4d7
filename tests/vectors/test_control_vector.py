"""The value: directions, digest, arithmetic, checks."""

from __future__ import annotations

import hashlib
import pickle
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from steer_engine.errors import ModelMismatchError, VectorFileError
from steer_engine.vectors import ControlVector, VectorMetadata

WIDTH = 5
directions = arrays(np.float32, WIDTH, elements=st.floats(-1e6, 1e6, width=32))
vectors = st.dictionaries(st.integers(0, 40), directions, min_size=1, max_size=4).map(
    lambda by_block: ControlVector(directions=by_block)
)
scales = st.floats(-100, 100)


def zeros_removed(vector: ControlVector) -> dict[int, list[float]]:
    return {block: v.tolist() for block, v in vector.directions.items() if v.any()}


def test_blocks_are_sorted_and_directions_are_read_only_copies() -> None:
    given_array = np.ones(3, dtype=np.float64)
    vector = ControlVector(directions={9: given_array, np.int64(4): np.zeros(3, np.float16)})
    given_array[0] = 99.0
    assert vector.blocks == (4, 9)
    assert vector.directions[9].tolist() == [1.0, 1.0, 1.0]
    assert {v.dtype for v in vector.directions.values()} == {np.dtype(np.float32)}
    with pytest.raises(ValueError, match="read-only"):
        vector.directions[9][0] = 2.0
    with pytest.raises(TypeError):
        vector.directions[1] = given_array  # type: ignore[index]


def test_norms_are_those_of_float64() -> None:
    vector = ControlVector(directions={0: np.array([3.0, 4.0], np.float32), 1: np.full(2, 2e38, np.float32)})
    assert vector.norms[0] == 5.0
    assert vector.norms[1] == pytest.approx(float(np.float32(2e38)) * 2**0.5, rel=1e-12)


@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ({}, "at least one block"),
        ({-1: np.ones(2)}, "Block -1 is not a block number"),
        ({1024: np.ones(2)}, "Block 1024 is not a block number"),
        ({True: np.ones(2)}, "Block true is not a block number"),
        ({"3": np.ones(2)}, "Block '3' is not a block number"),
        ({0: np.ones((1, 2))}, r"shape \[1, 2\]"),
        ({0: np.float32(1)}, r"shape \[\]"),
        ({0: np.ones(0)}, r"shape \[0\]"),
        ({0: np.ones(65537)}, r"shape \[65537\]"),
        ({0: np.ones(2, dtype=np.int64)}, "dtype int64"),
        ({0: np.ones(2, dtype=np.complex64)}, "dtype complex64"),
        ({0: np.array([1.0, np.nan])}, "block 0 has values that are not finite"),
        ({0: np.array([1.0, -np.inf])}, "block 0 has values that are not finite"),
        ({0: np.array([1.0, 1e39])}, "block 0 has values that are not finite in float32"),
        ({0: np.ones(2), 1: np.ones(3)}, "Hidden sizes differ: 2 before block 1, 3 at it"),
    ],
)
def test_what_is_not_a_direction_is_refused(bad: dict[int, np.ndarray], sentence: str) -> None:
    with pytest.raises(VectorFileError, match=sentence):
        ControlVector(directions=bad)


def test_metadata_must_fit_the_directions() -> None:
    with pytest.raises(VectorFileError, match="hidden size 4 but the directions have 2"):
        ControlVector(directions={0: np.ones(2)}, metadata=VectorMetadata(hidden_size=4))
    with pytest.raises(VectorFileError, match="block 3, but the metadata says that the model has 3 blocks"):
        ControlVector(directions={3: np.ones(2)}, metadata=VectorMetadata(num_blocks=3))
    assert ControlVector(directions={0: np.ones(2)}).metadata.hidden_size == 2


def test_the_digest_is_what_its_docstring_says(vector: ControlVector) -> None:
    content = b"steer-engine control vector v1\n"
    for block in (2, 3, 7):
        content += struct.pack("<II", block, 6) + struct.pack("<6f", *vector.directions[block].tolist())
    for block, norm in ((2, 10.5), (3, 11.25), (7, 0.1)):
        content += struct.pack("<Id", block, norm)
    assert vector.digest == "sha256:" + hashlib.sha256(content).hexdigest()


def test_the_site_is_part_of_the_digest_unless_it_is_the_stream(vector: ControlVector) -> None:
    of_sites = {site: vector.with_metadata(site=site) for site in ("block", "attn", "mlp")}
    assert of_sites["block"].digest == vector.digest
    assert len({each.digest for each in of_sites.values()}) == 3
    assert (-of_sites["mlp"] * 2.0).metadata.site == "mlp"
    assert (of_sites["mlp"] + of_sites["mlp"]).metadata.site == "mlp"
    with pytest.raises(VectorFileError, match="Vectors of the sites 'mlp' and 'block' cannot be added"):
        of_sites["mlp"] - vector


def test_the_digest_of_a_known_vector_never_changes() -> None:
    vector = ControlVector(
        directions={1: np.array([1.0, -2.0], np.float32)}, metadata=VectorMetadata(residual_norms={1: 8.0})
    )
    assert vector.digest == "sha256:121b5f0fae6df634d644a9fad054a8ecf22e6e1dc083e0139a42e495b97d6428"


def test_the_digest_goes_by_content_alone(vector: ControlVector) -> None:
    same = ControlVector(
        directions=dict(reversed(vector.directions.items())),
        metadata=VectorMetadata(model="renamed", residual_norms={**vector.metadata.residual_norms, 11: 3.0}),
    )
    assert same == vector
    assert hash(same) == hash(vector)
    for other in (
        vector * 1.0000001,
        vector.restrict([2, 3]),
        vector.with_metadata(residual_norms={2: 10.5, 3: 11.25}),
        ControlVector(
            directions={b + 1: v for b, v in vector.directions.items()},
            metadata=VectorMetadata(residual_norms=vector.metadata.residual_norms),
        ),
    ):
        assert other != vector
    assert vector != "a text"


@given(vectors, vectors, scales)
def test_arithmetic_is_that_of_a_vector_space(a: ControlVector, b: ControlVector, scale: float) -> None:
    assert a + b == b + a
    negated = -a
    assert -negated == a
    assert zeros_removed(a - a) == {}
    assert zeros_removed(a * 0.0) == {}
    assert a - b == a + (-b)
    assert (a - b) == -(b - a) or zeros_removed(a - b) == zeros_removed(-(b - a))
    assert scale * a == a * scale
    assert a * 2.0 == a + a
    for block in (a + b).blocks:
        zero = np.zeros(WIDTH, np.float32)
        expected = a.directions.get(block, zero) + b.directions.get(block, zero)
        assert np.array_equal((a + b).directions[block], expected)
    for block, direction in (a * scale).directions.items():
        expected = a.directions[block].astype(np.float64) * scale
        # One rounding of a float64 product to float32, half a unit in the last place, or half the smallest subnormal.
        assert np.all(np.abs(direction - expected) <= np.maximum(np.abs(expected) * 2**-24, 2**-150))


def test_division_and_operands_of_other_types(vector: ControlVector) -> None:
    assert (vector / 4) * 4.0 == vector
    assert vector / np.float32(2) == vector * 0.5
    with pytest.raises(ZeroDivisionError):
        vector / 0
    with pytest.raises(TypeError):
        vector * "2"  # type: ignore[operator]
    with pytest.raises(TypeError):
        vector + 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        vector - 1  # type: ignore[operator]
    with pytest.raises(TypeError):
        vector / "2"  # type: ignore[operator]


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39])
def test_a_scale_that_leaves_float32_is_refused(vector: ControlVector, scale: float) -> None:
    with pytest.raises(VectorFileError, match="not finite"):
        vector * scale


def test_sums_need_equal_hidden_sizes_and_stay_finite(vector: ControlVector) -> None:
    with pytest.raises(VectorFileError, match="Hidden sizes 6 and 2"):
        vector + ControlVector(directions={0: np.ones(2)})
    huge = ControlVector(directions={0: np.full(2, 3e38)})
    with pytest.raises(VectorFileError, match="not finite"):
        huge + huge


def test_metadata_of_a_sum_keeps_equal_fields(vector: ControlVector) -> None:
    other = vector.with_metadata(method="mean", residual_norms={3: 12.75, 8: 4.0}, extra={})
    joined = (vector + other).metadata
    assert joined == (other + vector).metadata
    assert joined.model == "example/tiny"
    assert joined.method == ""
    assert joined.residual_norms == {2: 10.5, 3: 12.0, 7: 0.1, 8: 4.0}
    assert (vector + vector).metadata == vector.with_metadata(condition=None, probe=None).metadata


def test_a_condition_is_not_kept_for_other_directions(vector: ControlVector) -> None:
    # Its threshold would be wrong: -v and a sum point elsewhere, and 2 * v has twice the dot product.
    assert vector.metadata.condition is not None
    for other in (-vector, vector * 2, 2 * vector, vector / 2, vector + vector, vector - vector * 0.5):
        assert other.metadata.condition is None
        assert other.metadata.model == vector.metadata.model
    assert vector.restrict([2, 7]).metadata.condition == vector.metadata.condition
    assert vector.restrict([2, 3]).metadata.condition is None  # it needs block 7


def test_a_probe_is_not_kept_for_other_directions(vector: ControlVector) -> None:
    probe = vector.metadata.probe
    assert probe is not None
    for other in (-vector, vector * 2, 2 * vector, vector / 2, vector + vector, vector - vector * 0.5):
        assert other.metadata.probe is None
    assert vector.restrict([2, 3, 7]).metadata.probe == probe
    assert vector.restrict([2, 3]).metadata.probe == probe.model_copy(update={"blocks": {3: probe.blocks[3]}})
    assert vector.restrict([2]).metadata.probe is None


@pytest.mark.parametrize("fitted", ["condition", "probe"])
def test_what_was_fitted_is_not_part_of_the_digest(fitted: str, vector: ControlVector) -> None:
    assert vector.with_metadata(**{fitted: None}).digest == vector.digest


def test_restrict(vector: ControlVector) -> None:
    part = vector.restrict(range(3, 20))
    assert part.blocks == (3, 7)
    assert np.array_equal(part.directions[7], vector.directions[7])
    with pytest.raises(VectorFileError, match=r"None of the blocks \[5\] has a direction"):
        vector.restrict([5])


def test_check_against_a_model(vector: ControlVector) -> None:
    vector.check(hidden_size=6, num_blocks=8)
    with pytest.raises(ModelMismatchError, match="hidden size 6 but the model has 8.*example/tiny"):
        vector.check(hidden_size=8, num_blocks=8)
    with pytest.raises(ModelMismatchError, match="block 7 but the model's last is 6"):
        vector.check(hidden_size=6, num_blocks=7)


def test_pickling_keeps_everything(vector: ControlVector) -> None:
    back = pickle.loads(pickle.dumps(vector))
    assert back == vector
    assert back.metadata == vector.metadata


def test_repr_is_short(vector: ControlVector) -> None:
    assert repr(vector) == f"ControlVector(3 blocks 2..7, hidden_size=6, {vector.digest[:19]})"


def test_long_values_are_cut_in_messages() -> None:
    vector = ControlVector(directions={1: np.ones(4)}, metadata=VectorMetadata(model="m" * 1000))
    for shape in ({"hidden_size": 8, "num_blocks": 9}, {"hidden_size": 4, "num_blocks": 1}):
        with pytest.raises(ModelMismatchError, match=r"it was made for 'm{70,76}\.\.\.'") as caught:
            vector.check(**shape)
        assert len(caught.value.message) < 200
    with pytest.raises(VectorFileError, match="Block a huge number is not"):
        ControlVector(directions={10**4000: np.ones(4)})
    with pytest.raises(VectorFileError, match=r"metadata field 'created_with\.k{40,80}\.\.\.' is not usable") as long:
        VectorMetadata.checked({"created_with": {"k" * 100_000: "1"}})
    assert len(long.value.message) < 200
