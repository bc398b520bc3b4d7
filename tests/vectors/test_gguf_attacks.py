"""Hostile GGUF headers."""

from __future__ import annotations

import struct
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from steer_engine.errors import VectorFileError
from steer_engine.vectors import ControlVector
from steer_engine.vectors.gguf_format import check_header, load, save


def text(content: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(content) if length is None else length) + content


def key(name: bytes, kind: int, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def tensor(name: bytes = b"direction.1", dims: tuple[int, ...] = (2,), kind: int = 0, offset: int = 0) -> bytes:
    return (
        text(name)
        + struct.pack("<I", len(dims))
        + b"".join(struct.pack("<Q", d) for d in dims)
        + struct.pack("<IQ", kind, offset)
    )


def file(
    keys: tuple[bytes, ...] = (key(b"general.architecture", 8, text(b"controlvector")),),
    tensors: tuple[bytes, ...] = (tensor(),),
    data: bytes = struct.pack("<2f", 1.0, 2.0),
    magic: bytes = b"GGUF",
    version: int = 3,
    num_keys: int | None = None,
    num_tensors: int | None = None,
    alignment: int = 32,
) -> bytes:
    head = magic + struct.pack(
        "<IQQ",
        version,
        len(tensors) if num_tensors is None else num_tensors,
        len(keys) if num_keys is None else num_keys,
    )
    head += b"".join(keys) + b"".join(tensors)
    return head + b"\0" * (-len(head) % alignment) + data


ARCHITECTURE = key(b"general.architecture", 8, text(b"controlvector"))


def array(kind: int, length: int, content: bytes) -> bytes:
    return key(b"a", 9, struct.pack("<IQ", kind, length) + content)


ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "ends inside a magic"),
    "another magic": (file(magic=b"GGML"), "does not begin with 'GGUF'"),
    "big-endian": (file(version=3 << 24), "version 50331648 is not read"),
    "version 1": (file(version=1), "version 1 is not read"),
    "no tensors": (file(tensors=()), "declares 0 tensors"),
    "2**63 tensors": (file(num_tensors=2**63), "declares 9223372036854775808 tensors"),
    "more tensors than there are": (file(num_tensors=2), "1065353216 dimensions"),
    "2**63 keys": (file(num_keys=2**63), "keys; at most 256"),
    "a key of 2**62 bytes": (file(keys=(text(b"k", 2**62),)), "at most 1048576 are read"),
    "a value past the end": (file(keys=(key(b"k", 8, text(b"v", 2**19)),)), "ends inside a value"),
    "an array of 2**60": (file(keys=(array(4, 2**60, b""),)), "1152921504606846976 elements"),
    "an array past the end": (file(keys=(array(12, 4096, b""),)), "ends inside a value"),
    "an array of arrays": (file(keys=(array(9, 1, struct.pack("<IQ", 4, 0)),)), "Value type 9"),
    "value type 99": (file(keys=(key(b"k", 99, b""),)), "Value type 99"),
    "alignment 0": (file(keys=(key(b"general.alignment", 4, struct.pack("<I", 0)),)), "Alignment 0 "),
    "alignment 3": (file(keys=(key(b"general.alignment", 4, struct.pack("<I", 3)),)), "Alignment 3 "),
    "alignment 2**31": (file(keys=(key(b"general.alignment", 4, struct.pack("<I", 2**31)),)), "not a power"),
    "2**31 dimensions": (
        file(tensors=(text(b"direction.1") + struct.pack("<I", 2**31),)),
        "2147483648 dimensions",
    ),
    "no dimension": (file(tensors=(tensor(dims=()),)), "0 dimensions"),
    "2**63 wide": (file(tensors=(tensor(dims=(2**63,)),)), "9223372036854775808 elements"),
    "0 wide": (file(tensors=(tensor(dims=(0,)),)), "has 0 elements"),
    "quantised": (file(tensors=(tensor(kind=2),)), "GGML type 2"),
    "an unknown type": (file(tensors=(tensor(kind=12345),)), "GGML type 12345"),
    "an offset of 2**63": (file(tensors=(tensor(offset=2**63),)), "the file has"),
    "an overlap": (
        file(tensors=(tensor(), tensor(b"direction.2", offset=4)), data=b"\0" * 16),
        "overlap at data byte 4",
    ),
    "data cut short": (file(data=b"\0" * 7), "the file has"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused_quickly(name: str, tmp_path: Path) -> None:
    data, sentence = ATTACKS[name]
    path = tmp_path / "v.gguf"
    path.write_bytes(data)
    before = time.perf_counter()
    with pytest.raises(VectorFileError, match=sentence):
        load(path)
    assert time.perf_counter() - before < 0.5


def test_the_template_of_these_attacks_is_a_good_file(tmp_path: Path) -> None:
    (tmp_path / "v.gguf").write_bytes(file())
    assert load(tmp_path / "v.gguf").directions[1].tolist() == [1.0, 2.0]
    extras = (
        ARCHITECTURE,
        array(8, 2, text(b"x") + text(b"y")),
        array(5, 2, b"\0" * 8),
        key(b"f", 12, b"\0" * 8),
        key(b"general.alignment", 4, struct.pack("<I", 64)),
    )
    check_header(file(keys=extras, alignment=64))


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (file(keys=(ARCHITECTURE, ARCHITECTURE)), "Duplicate general.architecture"),
        (file(keys=(key(b"\xff", 8, text(b"")),)), "UnicodeDecodeError"),
        (file(tensors=(tensor(), tensor(offset=8)), data=b"\0" * 16), "duplicated tensor"),
        (file(keys=(key(b"general.alignment", 5, b"\x20\0\0\0"),)), "Bad type for general.alignment"),
    ],
)
def test_what_the_gguf_package_refuses_is_a_vector_file_error(data: bytes, sentence: str, tmp_path: Path) -> None:
    check_header(data)
    (tmp_path / "v.gguf").write_bytes(data)
    with pytest.raises(VectorFileError, match=f"The gguf package cannot read it .*{sentence}"):
        load(tmp_path / "v.gguf")


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_any_damage_is_a_vector_file_error_or_a_vector(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "v.gguf"
    save(ControlVector(directions={1: np.ones(4, np.float32), 2: np.zeros(4, np.float32)}), path)
    good = path.read_bytes()
    at = data.draw(st.integers(0, len(good) - 1))
    byte = data.draw(st.integers(0, 255))
    for damaged in (good[:at] + bytes([byte]) + good[at + 1 :], good[:at]):
        path.write_bytes(damaged)
        try:
            load(path)
        except VectorFileError:
            continue
