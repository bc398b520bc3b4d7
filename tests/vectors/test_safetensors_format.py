"""Control vectors in safetensors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from steer_engine.errors import VectorFileError
from steer_engine.vectors import ControlVector, VectorMetadata
from steer_engine.vectors.safetensors_format import DType, from_bytes, load, save, to_bytes

GOLDEN = (
    b"\xc8\x00\x00\x00\x00\x00\x00\x00"
    b'{"__metadata__":{"format":"control-vector","format_version":"1","hidden_size":"2","method":"mean",'
    b'"residual_norms":"{\\"1\\":8.0}"},'
    b'"direction.1":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}       '
    b"\x00\x00\x80?\x00\x00\x00\xc0"
)


def golden_vector() -> ControlVector:
    return ControlVector(
        directions={1: np.array([1.0, -2.0], np.float32)},
        metadata=VectorMetadata(method="mean", residual_norms={1: 8.0}),
    )


def test_golden_bytes_both_ways() -> None:
    assert to_bytes(golden_vector()) == GOLDEN
    back = from_bytes(GOLDEN)
    assert back == golden_vector()
    assert back.metadata == golden_vector().metadata


def test_round_trip_with_metadata(vector: ControlVector) -> None:
    back = from_bytes(to_bytes(vector))
    assert back == vector
    assert back.metadata == vector.metadata
    assert to_bytes(back) == to_bytes(vector)


def test_the_safetensors_package_reads_ours_and_we_read_its(vector: ControlVector, tmp_path: Path) -> None:
    theirs = safetensors.numpy.load(to_bytes(vector))
    assert set(theirs) == {"direction.2", "direction.3", "direction.7"}
    assert np.array_equal(theirs["direction.7"], vector.directions[7])
    metadata = {"format": "control-vector", "format_version": "1", "tool": "other"}
    half = {name: tensor.astype(np.float16) for name, tensor in theirs.items()}
    path = tmp_path / "theirs.safetensors"
    safetensors.numpy.save_file(half, path, metadata=metadata)
    back = load(path)
    assert back.blocks == (2, 3, 7)
    assert np.array_equal(back.directions[2], half["direction.2"].astype(np.float32))
    assert back.metadata.extra == {"tool": "other"}


@given(
    st.dictionaries(
        st.integers(0, 1023), arrays(np.float32, 3, elements=st.floats(-1e4, 1e4, width=32)), min_size=1, max_size=5
    ),
    st.dictionaries(st.integers(0, 1023), st.floats(1e-300, 1e300), max_size=5),
    st.text(st.characters(codec="utf-8"), max_size=30),
    st.dictionaries(
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=9), st.text(st.characters(codec="utf-8"))
    ),
)
def test_any_vector_survives_the_round_trip(
    by_block: dict[int, np.ndarray], norms: dict[int, float], text: str, extra: dict[str, str]
) -> None:
    metadata = VectorMetadata(model=text, notes=text, residual_norms=norms, extra=extra, created_with=extra)
    vector = ControlVector(directions=by_block, metadata=metadata)
    back = from_bytes(to_bytes(vector))
    assert back.digest == vector.digest
    assert back.metadata == vector.metadata


@pytest.mark.parametrize(("dtype", "mantissa_bits"), [("float16", 10), ("bfloat16", 7)])
def test_sixteen_bits_round_to_nearest(dtype: DType, mantissa_bits: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=4096).astype(np.float32)
    back = from_bytes(to_bytes(ControlVector(directions={0: values}), dtype)).directions[0]
    bound = np.abs(values) * 2.0 ** -(mantissa_bits + 1)
    assert np.all(np.abs(back - values) <= np.maximum(bound, 2.0**-25))  # 2**-25: half a subnormal of float16
    assert np.abs(back - values).max() > 0
    # Representable values are exact, so a second round trip changes nothing.
    again = from_bytes(to_bytes(ControlVector(directions={0: back}), dtype)).directions[0]
    assert np.array_equal(again, back)


def test_bfloat16_rounds_ties_to_even_and_refuses_overflow() -> None:
    tie_down, tie_up = 1.0 + 2**-8, 1.0 + 3 * 2**-8
    vector = ControlVector(directions={0: np.array([tie_down, tie_up, -tie_up], np.float32)})
    assert from_bytes(to_bytes(vector, "bfloat16")).directions[0].tolist() == [1.0, 1.015625, -1.015625]
    with pytest.raises(VectorFileError, match="block 0 has values too large for F16"):
        to_bytes(ControlVector(directions={0: np.array([7e4])}), "float16")
    with pytest.raises(VectorFileError, match="block 0 has values too large for BF16"):
        to_bytes(ControlVector(directions={0: np.array([3.4e38])}), "bfloat16")
    with pytest.raises(VectorFileError, match="dtype 'int8' is not supported"):
        to_bytes(vector, "int8")  # type: ignore[arg-type]


def test_files_are_named_in_errors(tmp_path: Path) -> None:
    with pytest.raises(VectorFileError, match=r"gone\.safetensors: cannot be read"):
        load(tmp_path / "gone.safetensors")
    (tmp_path / "short.safetensors").write_bytes(b"abc")
    with pytest.raises(VectorFileError, match=r"short\.safetensors: 3 bytes are too few"):
        load(tmp_path / "short.safetensors")


def test_save_and_load(vector: ControlVector, tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "v.safetensors"
    save(vector, path)
    assert load(path) == vector
    save(-vector, path)
    assert load(path) == -vector
    assert [p.name for p in path.parent.iterdir()] == ["v.safetensors"]


def test_too_much_metadata_is_refused_when_writing() -> None:
    blocks = {block: np.ones(1, np.float32) for block in range(1024)}
    extra = {f"{i:0127d}": "\x00" * 1024 for i in range(64)}  # each NUL is six characters of JSON
    vector = ControlVector(
        directions=blocks, metadata=VectorMetadata(extra=extra, created_with=extra, notes="\x00" * 16384)
    )
    with pytest.raises(VectorFileError, match="The metadata is too long"):
        to_bytes(vector)
