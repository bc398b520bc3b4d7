"""What an API process believes of its engines is good for less time than they promise to keep a vector."""

from __future__ import annotations

from steer_engine.api.frontend import FRESH_SECONDS, Held
from steer_engine.engine.admission import PIN_SECONDS


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_confirmed_vector_is_fresh_for_a_while() -> None:
    clock = Clock()
    held = Held(clock)
    assert "a" not in held
    assert not held.is_fresh("a")
    held.confirm("a", held.now())
    clock.now += FRESH_SECONDS - 1
    assert held.is_fresh("a")
    clock.now += 1
    assert not held.is_fresh("a")
    assert "a" in held, "it may be asked for instead of being sent again"


def test_the_time_counts_from_the_question_not_the_answer() -> None:
    clock = Clock()
    held = Held(clock)
    asked = held.now()
    clock.now += FRESH_SECONDS + 1
    held.confirm("a", asked)
    assert not held.is_fresh("a")


def test_what_an_engine_dropped_is_forgotten() -> None:
    held = Held(Clock())
    for digest in "abc":
        held.confirm(digest, held.now())
    held.forget(["a", "c", "x"])
    assert ["a" in held, "b" in held, "c" in held] == [False, True, False]


def test_an_engine_keeps_it_longer_than_the_belief_lasts() -> None:
    assert FRESH_SECONDS + 10 <= PIN_SECONDS
