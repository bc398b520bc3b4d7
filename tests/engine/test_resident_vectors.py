"""The budget of resident vectors: those in use or just named stay, the least recently used of the rest are dropped."""

from __future__ import annotations

import time

import pytest

from steer_engine.engine.admission import MAX_LISTED, ResidentVectors
from steer_engine.settings import PIN_SECONDS, EngineLimits

LATER = PIN_SECONDS + 1


def resident_with(budget: int = 100, **sizes: int) -> ResidentVectors:
    resident = ResidentVectors(budget=budget)
    for digest, size in sizes.items():
        resident.put(digest, size, now=0.0)
    return resident


def test_room_needs_no_victims() -> None:
    assert resident_with(a=40, b=40).make_room(20, in_use=(), now=LATER) == []


def test_the_least_recently_used_goes_first() -> None:
    resident = resident_with(a=40, b=40)
    assert resident.make_room(30, in_use=(), now=LATER) == ["a"]
    resident.touch(["a"], now=0.0)
    assert resident.make_room(30, in_use=(), now=LATER) == ["b"]
    assert resident.make_room(100, in_use=(), now=LATER) == ["b", "a"]


def test_a_vector_that_a_request_names_stays() -> None:
    resident = resident_with(a=40, b=40)
    assert resident.make_room(30, in_use={"a"}, now=LATER) == ["b"]
    assert resident.make_room(70, in_use={"a"}, now=LATER) is None


def test_a_vector_that_was_just_shipped_or_named_stays() -> None:
    resident = resident_with(a=40, b=40)
    assert resident.make_room(30, in_use=(), now=PIN_SECONDS / 2) is None
    resident.touch(["a"], now=LATER)
    assert resident.make_room(30, in_use=(), now=LATER) == ["b"]


def test_putting_twice_counts_once() -> None:
    resident = resident_with(a=40)
    resident.put("a", 40, now=1.0)
    assert resident.num_bytes == 40
    resident.drop("a")
    assert "a" not in resident
    assert resident.num_bytes == 0
    resident.drop("a")


def test_holding_and_making_room_cost_the_same_for_any_number_of_vectors() -> None:
    resident = ResidentVectors(budget=100_000)
    for i in range(100_000):
        resident.put(str(i), 1, now=0.0)
    now = LATER
    began = time.process_time()
    for i in range(1000):
        assert resident.pin_if_resident(str(i), now)
        assert resident.make_room(1, in_use=(), now=now) == [str(i + 1)]
        assert resident.num_bytes == 100_000
    assert time.process_time() - began < 0.5, "adding up all sizes once takes 0.01 s"
    for i in range(100_000):
        resident.touch([str(i)], now)
    began = time.process_time()
    for _ in range(1000):
        assert resident.make_room(1, in_use=(), now=now) is None
    assert time.process_time() - began < 0.5, "all are pinned"


def test_a_report_lists_a_limited_number_of_vectors() -> None:
    resident = ResidentVectors(budget=10**9)
    for i in range(2 * MAX_LISTED):
        resident.put(f"{i:05}", 1, now=0.0)
    resident.touch(["00000"], now=1.0)
    listed = resident.digests()
    assert len(resident) == 2 * MAX_LISTED
    assert listed == ["00000", *(f"{i:05}" for i in range(MAX_LISTED + 1, 2 * MAX_LISTED))]


def test_the_budget_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(EngineLimits.variable("store_bytes"), "123")
    assert ResidentVectors().budget == 123


def test_a_confirmed_vector_is_kept_for_the_request_that_follows() -> None:
    resident = resident_with(a=40, b=40)
    assert resident.pin_if_resident("a", now=LATER)
    assert not resident.pin_if_resident("c", now=LATER)
    assert "c" not in resident
    assert resident.make_room(70, in_use=(), now=LATER + 1) is None
    assert resident.make_room(40, in_use=(), now=LATER + 1) == ["b"]
