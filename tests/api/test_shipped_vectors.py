"""An API process trusts an engine's confirmation for less time than the engine keeps the vector."""

from __future__ import annotations

from steer_engine.api.frontend import FRESH_SECONDS, ShippedVectors
from steer_engine.settings import PIN_SECONDS


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_confirmed_vector_is_fresh_for_a_while() -> None:
    clock = Clock()
    shipped = ShippedVectors(clock)
    assert "a" not in shipped
    assert not shipped.is_fresh("a")
    shipped.confirm("a", shipped.now())
    clock.now += FRESH_SECONDS - 1
    assert shipped.is_fresh("a")
    clock.now += 1
    assert not shipped.is_fresh("a")
    assert "a" in shipped, "the engine may confirm it again, without a second transfer"


def test_freshness_counts_from_the_question_not_the_answer() -> None:
    clock = Clock()
    shipped = ShippedVectors(clock)
    sent_at = shipped.now()
    clock.now += FRESH_SECONDS + 1
    shipped.confirm("a", sent_at)
    assert not shipped.is_fresh("a")


def test_dropped_vectors_are_forgotten() -> None:
    shipped = ShippedVectors(Clock())
    for digest in "abc":
        shipped.confirm(digest, shipped.now())
    shipped.forget(["a", "c", "x"])
    assert ["a" in shipped, "b" in shipped, "c" in shipped] == [False, True, False]


def test_an_engine_keeps_a_vector_longer_than_it_is_fresh() -> None:
    assert FRESH_SECONDS + 10 <= PIN_SECONDS
