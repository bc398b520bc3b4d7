"""The cache of loaded vectors stays within its budget, and inline vectors are limited, checked and cached by digest."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer_engine.errors import PayloadTooLargeError, SteeringRequestError
from steer_engine.parse import parse_spec
from steer_engine.spec import SteeringSpec
from steer_engine.vectors import ControlVector
from steer_engine.vectors.cache import InlineVectors, VectorCache
from steer_engine.vectors.safetensors_format import to_bytes


def test_the_least_recently_used_entry_is_removed_first() -> None:
    cache: VectorCache[str] = VectorCache(budget=30)
    for digest in "abc":
        cache.put(digest, digest.upper(), 10)
    assert cache.get("a") == "A"
    cache.put("d", "D", 10)
    assert cache.get("b") is None
    assert cache.digests() == ["c", "a", "d"]


def test_the_newest_entry_stays_even_if_it_is_too_large() -> None:
    cache: VectorCache[str] = VectorCache(budget=30)
    cache.put("small", "S", 10)
    cache.put("large", "L", 100)
    assert cache.digests() == ["large"]
    cache.put("small", "S", 10)
    assert cache.digests() == ["small"]


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 40)), max_size=60))
def test_num_bytes_is_the_sum_over_the_entries(puts: list[tuple[int, int]]) -> None:
    cache: VectorCache[int] = VectorCache(budget=100)
    for number, num_bytes in puts:
        cache.put(str(number), num_bytes, num_bytes)
        entries = [cache.get(digest) for digest in cache.digests()]
        assert cache.num_bytes == sum(each or 0 for each in entries) <= 100


def one(value: float) -> ControlVector:
    return ControlVector(directions={1: np.full(4, value + 1, np.float32)})


def encoded(vector: ControlVector) -> str:
    return base64.b64encode(to_bytes(vector)).decode()


def spec(*vectors: Any) -> SteeringSpec:
    parsed = parse_spec({"edits": [{"vector": vector} for vector in vectors]})
    assert parsed is not None
    return parsed


def named(spec: SteeringSpec) -> list[Any]:
    assert spec.edits is not None
    return [edit.vector for edit in spec.edits]


def test_inline_vectors_become_digests_and_are_cached() -> None:
    inline = InlineVectors(100_000)
    taken, own = inline.take(spec({"data": encoded(one(1))}, "calm", {"data": encoded(one(2))}))
    assert own == {one(1).digest: one(1), one(2).digest: one(2)}
    assert named(taken) == [one(1).digest, "calm", one(2).digest]
    assert inline.find(one(1).digest) == one(1)
    assert inline.find(one(3).digest) is None
    assert inline.take(spec("calm")) == (spec("calm"), {})


@pytest.mark.parametrize(
    ("data", "param"),
    [
        ("????", "steering.edits[0].vector.data"),
        ("AAA", "steering.edits[0].vector.data"),
        ("QUJD\n", "steering.edits[0].vector.data"),
        ("é" * 4, "steering.edits[0].vector.data"),
        (base64.b64encode(b"hello, world").decode(), "steering.edits[0].vector.data"),
        (encoded(one(1))[:-4], "steering.edits[0].vector.data"),
    ],
)
def test_other_data_is_refused(data: str, param: str) -> None:
    with pytest.raises(SteeringRequestError) as refused:
        InlineVectors(100_000).take(spec({"data": data}))
    assert (refused.value.param, refused.value.status) == (param, 400)
    assert len(refused.value.message) < 300


def test_the_limit_applies_to_all_vectors_of_a_request_together() -> None:
    size = len(to_bytes(one(1)))
    inline = InlineVectors(2 * size)
    inline.take(spec({"data": encoded(one(1))}, {"data": encoded(one(2))}))
    with pytest.raises(PayloadTooLargeError) as refused:
        inline.take(spec(*({"data": encoded(one(i))} for i in range(3))))
    assert (refused.value.param, refused.value.status) == ("steering.edits[2].vector", 413)
    with pytest.raises(PayloadTooLargeError):
        inline.take(spec({"data": "A" * 10_000_000}))
    for excess in range(1, 4):  # sizes near the padding of base64
        with pytest.raises(PayloadTooLargeError):
            InlineVectors(size - excess).take(spec({"data": encoded(one(1))}))
    InlineVectors(size).take(spec({"data": encoded(one(1))}))


def test_a_vector_of_zeros_is_refused() -> None:
    zeros = ControlVector(directions={1: np.zeros(4, np.float32)})
    with pytest.raises(SteeringRequestError, match="zero"):
        InlineVectors(10_000).take(spec({"data": encoded(zeros)}))


def test_switched_off() -> None:
    with pytest.raises(SteeringRequestError, match="switched off"):
        InlineVectors(0).take(spec({"data": encoded(one(1))}))


def test_inline_vectors_are_cached_within_the_budget() -> None:
    inline = InlineVectors(100_000, budget=3 * 16)
    for i in range(3):
        inline.take(spec({"data": encoded(one(i))}))
    assert inline.find(one(0).digest) is not None
    inline.take(spec({"data": encoded(one(3))}))
    assert [inline.find(one(i).digest) is not None for i in range(4)] == [True, False, True, True]
    inline.take(spec({"data": encoded(one(3))}))
    assert inline.find(one(0).digest) is not None
