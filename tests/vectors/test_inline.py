"""Vectors in requests: bounded, held once by content, and never anything but a control vector."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import pytest

from steer_engine.errors import PayloadTooLargeError, SteeringRequestError
from steer_engine.spec import SteeringSpec, parse_spec
from steer_engine.vectors import ControlVector
from steer_engine.vectors.cache import InlineVectors
from steer_engine.vectors.safetensors_format import to_bytes


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


def test_inline_vectors_become_digests_and_are_held() -> None:
    inline = InlineVectors(100_000)
    taken = inline.take(spec({"data": encoded(one(1))}, "calm", {"data": encoded(one(2))}))
    assert named(taken) == [one(1).digest, "calm", one(2).digest]
    assert inline.find(one(1).digest) == one(1)
    assert inline.find(one(3).digest) is None
    assert inline.take(spec("calm")) == spec("calm")


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
def test_what_is_no_control_vector(data: str, param: str) -> None:
    with pytest.raises(SteeringRequestError) as refused:
        InlineVectors(100_000).take(spec({"data": data}))
    assert (refused.value.param, refused.value.status) == (param, 400)
    assert len(refused.value.message) < 300


def test_the_limit_is_over_all_vectors_of_a_request() -> None:
    size = len(to_bytes(one(1)))
    inline = InlineVectors(2 * size)
    inline.take(spec({"data": encoded(one(1))}, {"data": encoded(one(2))}))
    with pytest.raises(PayloadTooLargeError) as refused:
        inline.take(spec(*({"data": encoded(one(i))} for i in range(3))))
    assert (refused.value.param, refused.value.status) == ("steering.edits[2].vector", 413)
    with pytest.raises(PayloadTooLargeError):
        inline.take(spec({"data": "A" * 10_000_000}))
    for excess in range(1, 4):  # around the padding of base64
        with pytest.raises(PayloadTooLargeError):
            InlineVectors(size - excess).take(spec({"data": encoded(one(1))}))
    InlineVectors(size).take(spec({"data": encoded(one(1))}))


def test_a_vector_of_zeros_would_steer_nothing() -> None:
    zeros = ControlVector(directions={1: np.zeros(4, np.float32)})
    with pytest.raises(SteeringRequestError, match="zero"):
        InlineVectors(10_000).take(spec({"data": encoded(zeros)}))


def test_switched_off() -> None:
    with pytest.raises(SteeringRequestError, match="switched off"):
        InlineVectors(0).take(spec({"data": encoded(one(1))}))


def test_what_is_held_is_bounded_and_kept_by_use() -> None:
    inline = InlineVectors(100_000, budget=3 * 16)
    for i in range(3):
        inline.take(spec({"data": encoded(one(i))}))
    assert inline.find(one(0).digest) is not None
    inline.take(spec({"data": encoded(one(3))}))
    assert [inline.find(one(i).digest) is not None for i in range(4)] == [True, False, True, True]
    inline.take(spec({"data": encoded(one(3))}))
    assert inline.find(one(0).digest) is not None
