"""Hostile safetensors files. Each raises one VectorFileError, quickly and with little memory."""

from __future__ import annotations

import json
import struct
import time
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_engine.errors import VectorFileError
from steer_engine.vectors import ControlVector
from steer_engine.vectors.safetensors_format import MAX_HEADER_BYTES, from_bytes, to_bytes

META = {"format": "control-vector", "format_version": "1"}
TWO = struct.pack("<2f", 1.0, 2.0)


def entry(begin: int = 0, end: int = 8, shape: Any = (2,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}


def file(header: Any, data: bytes = TWO) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def with_tensors(tensors: dict[str, Any], data: bytes = TWO, metadata: Any = META) -> bytes:
    return file({"__metadata__": metadata, **tensors}, data)


def test_the_template_of_these_attacks_is_a_good_file() -> None:
    assert from_bytes(with_tensors({"direction.3": entry()})).directions[3].tolist() == [1.0, 2.0]
    # Entries of the header may have any order; the offsets give the order of the data.
    swapped = with_tensors({"direction.9": entry(8, 16), "direction.3": entry()}, TWO + TWO[::-1])
    assert from_bytes(swapped).blocks == (3, 9)


ATTACKS: dict[str, tuple[bytes, str]] = {
    "empty file": (b"", "too few"),
    "seven bytes": (b"\0" * 7, "too few"),
    "header size 0": (struct.pack("<Q", 0), "does not begin with '{'"),
    "header size 2**64-1": (struct.pack("<Q", 2**64 - 1) + b"{}", "18446744073709551615 bytes; at most"),
    "header longer than the file": (struct.pack("<Q", 64) + b"{}", "has 64 bytes; only 2 follow"),
    "header not JSON": (file(b"{not json"), "not valid JSON"),
    "header a list": (file(b"[]"), "does not begin"),
    "header after spaces": (file(b"  {}"), "does not begin"),
    "header not UTF-8": (file(b'{"\xff":1}'), "not UTF-8"),
    "nested 100,000 deep": (file(b'{"a":' * 100_000), "not valid JSON"),
    "an integer of 10,000 digits": (file(b'{"a":' + b"9" * 10_000 + b"}"), "not valid JSON"),
    "a NaN constant": (file(b'{"a":NaN}'), "value NaN"),
    "the same tensor twice": (
        file(b'{"__metadata__":{"format":"control-vector","format_version":"1"},"direction.1":{},"direction.1":{}}'),
        "same key twice",
    ),
    "no metadata": (file({"direction.3": entry()}), "missing or is not a map"),
    "metadata a list": (with_tensors({"direction.3": entry()}, metadata=[]), "missing or is not a map"),
    "metadata with a number": (with_tensors({}, metadata={**META, "model": 1}), "missing or is not a map"),
    "another format": (with_tensors({}, metadata={"format": "pt"}), "not a control vector"),
    "a later version": (with_tensors({}, metadata={**META, "format_version": "3"}), "version '3' is not supported"),
    "hidden size in words": (with_tensors({}, metadata={**META, "hidden_size": "two"}), "hidden_size is 'two'"),
    "hidden size with other digits": (with_tensors({}, metadata={**META, "hidden_size": "²"}), "whole number"),
    "norms not JSON": (with_tensors({}, metadata={**META, "residual_norms": "{"}), "not valid JSON"),
    "norms a surrogate": (with_tensors({}, metadata={**META, "residual_norms": "\ud800"}), "not valid JSON"),
    "norms a list": (with_tensors({}, metadata={**META, "residual_norms": "[]"}), "not a JSON object"),
    "norms of block x": (with_tensors({}, metadata={**META, "residual_norms": '{"x":1.0}'}), "block 'x'"),
    "norms of block 01": (with_tensors({}, metadata={**META, "residual_norms": '{"01":1.0}'}), "block '01'"),
    "a negative norm": (with_tensors({}, metadata={**META, "residual_norms": '{"1":-1.0}'}), "must be positive"),
    "an infinite norm": (with_tensors({}, metadata={**META, "residual_norms": '{"1":1e999}'}), "must be positive"),
    "a norm of text": (with_tensors({}, metadata={**META, "residual_norms": '{"1":"2"}'}), "residual_norms"),
    "a surrogate in the model": (with_tensors({}, metadata={**META, "model": "\ud800"}), "field 'model'"),
    "hidden size that differs": (
        with_tensors({"direction.3": entry()}, metadata={**META, "hidden_size": "3"}),
        "hidden size 3 but the directions have 2",
    ),
    "block beyond the model": (
        with_tensors({"direction.3": entry()}, metadata={**META, "num_blocks": "3"}),
        "block 3, but the metadata says",
    ),
    "no tensors": (with_tensors({}), "no tensors"),
    "no tensors but data": (with_tensors({}, b"abcd"), "no tensors"),
    "a foreign tensor": (with_tensors({"weight": entry()}), "'weight' does not belong"),
    "a negative block": (with_tensors({"direction.-1": entry()}), "does not belong"),
    "a leading zero": (with_tensors({"direction.01": entry()}), "does not belong"),
    "a newline after the name": (with_tensors({"direction.1\n": entry()}), "does not belong"),
    "digits of another script": (with_tensors({"direction.٣": entry()}), "does not belong"),
    "block 1024": (with_tensors({"direction.1024": entry()}), "does not belong"),
    "a name of 100 kB": (with_tensors({"x" * 100_000: entry()}), "does not belong"),
    "an entry that is a number": (with_tensors({"direction.1": 3}), "not described by exactly"),
    "an entry without a shape": (with_tensors({"direction.1": {"dtype": "F32"}}), "not described by exactly"),
    "an entry with more": (with_tensors({"direction.1": {**entry(), "x": 1}}), "not described by exactly"),
    "dtype F64": (with_tensors({"direction.1": entry(dtype="F64")}), "dtype 'F64'"),
    "dtype a list": (with_tensors({"direction.1": entry(dtype=["F32"])}), "valid are F32, F16, BF16"),
    "dtype a dict": (with_tensors({"direction.1": entry(dtype={})}), "valid are F32, F16, BF16"),
    "rank 0": (with_tensors({"direction.1": entry(0, 4, ())}, TWO[:4]), r"shape \[\]"),
    "rank 2": (with_tensors({"direction.1": entry(shape=(1, 2))}), r"shape \[1, 2\]"),
    "width 0": (with_tensors({"direction.1": entry(0, 0, (0,))}, b""), r"shape \[0\]"),
    "width -2": (with_tensors({"direction.1": entry(shape=(-2,))}), r"shape \[-2\]"),
    "width 2.0": (with_tensors({"direction.1": entry(shape=(2.0,))}), r"shape \[2.0\]"),
    "width true": (with_tensors({"direction.1": entry(0, 4, (True,))}, TWO[:4]), r"shape \[True\]"),
    "width 2**62": (with_tensors({"direction.1": entry(0, 2**64, (2**62,))}), "is needed"),
    "width of text": (with_tensors({"direction.1": {**entry(), "shape": "2"}}), "is needed"),
    "offsets of three": (with_tensors({"direction.1": {**entry(), "data_offsets": [0, 8, 8]}}), "do not fit"),
    "offsets backwards": (with_tensors({"direction.1": entry(8, 0)}), "do not fit"),
    "offsets negative": (with_tensors({"direction.1": entry(-8, 0)}), "do not fit"),
    "offsets too short": (with_tensors({"direction.1": entry(0, 7)}), "do not fit"),
    "offsets of text": (with_tensors({"direction.1": {**entry(), "data_offsets": "08"}}), "do not fit"),
    "offsets 2**64 up": (with_tensors({"direction.1": entry(2**64, 2**64 + 8)}), "a gap or an overlap"),
    "a gap before": (with_tensors({"direction.1": entry(4, 12)}, TWO * 2), "begins at byte 4, not 0"),
    "a gap between": (with_tensors({"direction.1": entry(), "direction.2": entry(12, 20)}, TWO * 3), "byte 12, not 8"),
    "an overlap": (with_tensors({"direction.1": entry(), "direction.2": entry(4, 12)}, TWO * 2), "byte 4, not 8"),
    "two on the same bytes": (with_tensors({"direction.1": entry(), "direction.2": entry()}), "byte 0, not 8"),
    "too little data": (with_tensors({"direction.1": entry()}, TWO[:7]), "need 8 bytes of data but the file has 7"),
    "trailing bytes": (with_tensors({"direction.1": entry()}, TWO + b"x"), "need 8 bytes of data but the file has 9"),
    "two widths": (
        with_tensors({"direction.1": entry(), "direction.2": entry(8, 12, (1,))}, TWO + TWO[:4]),
        "Hidden sizes differ",
    ),
    "NaN": (with_tensors({"direction.1": entry()}, struct.pack("<2f", 1.0, float("nan"))), "not finite"),
    "infinity in F16": (with_tensors({"direction.1": entry(0, 4, dtype="F16")}, b"\0\0\0\x7c"), "not finite"),
    "NaN in BF16": (with_tensors({"direction.1": entry(0, 4, dtype="BF16")}, b"\0\0\xc0\x7f"), "not finite"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attack_is_refused_with_its_own_sentence(name: str) -> None:
    data, sentence = ATTACKS[name]
    with pytest.raises(VectorFileError, match=sentence) as caught:
        from_bytes(data)
    assert len(caught.value.message) < 400  # the message quotes little of the attacker's text
    caught.value.message.encode()


def test_a_million_keys_are_refused_unread() -> None:
    header = b"{" + b",".join(b'"direction.%d":{}' % i for i in range(1_000_000)) + b"}"
    data = file(header)
    tracemalloc.start()
    before = time.perf_counter()
    with pytest.raises(VectorFileError, match="at most"):
        from_bytes(data)
    seconds = time.perf_counter() - before
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert seconds < 0.05
    assert peak < 100_000


def test_the_largest_accepted_header_is_read_quickly() -> None:
    keys = b",".join(b'"%x":0' % i for i in range(110_000))
    header = (b"{" + keys)[: MAX_HEADER_BYTES - 7].rpartition(b",")[0] + b"}"
    before = time.perf_counter()
    with pytest.raises(VectorFileError):
        from_bytes(file(header))
    assert time.perf_counter() - before < 2.0


def test_a_file_that_is_too_large_is_refused_before_it_is_parsed() -> None:
    class Huge(bytes):
        def __len__(self) -> int:
            return 2**40

    with pytest.raises(VectorFileError, match="more than the largest control vector"):
        from_bytes(Huge())


GOOD = to_bytes(ControlVector(directions={1: np.ones(4, np.float32), 2: np.zeros(4, np.float32)}))


@settings(max_examples=400)
@given(st.integers(0, len(GOOD) - 1), st.integers(0, 255), st.integers(0, len(GOOD)))
def test_any_damage_is_a_vector_file_error_or_a_vector(at: int, byte: int, cut: int) -> None:
    for damaged in (GOOD[:at] + bytes([byte]) + GOOD[at + 1 :], GOOD[:cut], GOOD[:at] + GOOD[cut:]):
        try:
            from_bytes(damaged)
        except VectorFileError:
            continue


@given(st.binary(max_size=200))
def test_noise_is_a_vector_file_error(noise: bytes) -> None:
    with pytest.raises(VectorFileError):
        from_bytes(noise)
    with pytest.raises(VectorFileError):
        from_bytes(file(b"{" + noise))
