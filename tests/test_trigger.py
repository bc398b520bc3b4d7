"""`Windows` against the definition of a window, position by position."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import product

import pytest
from helpers.oracle_when import window_at
from hypothesis import event, given, settings
from hypothesis import strategies as st

from steer_engine import trigger as trigger_module
from steer_engine.trigger import NEVER, NO_END, Trigger, Windows

AHEAD = 9
"""Positions after the known tokens that are looked at too."""
OTHER = 0
"""A token that is in no sequence."""

texts = st.lists(st.integers(1, 2), max_size=60) | st.lists(st.integers(1, 3), max_size=12)
sequences = st.lists(st.integers(1, 2), max_size=4).map(tuple)
sizes = st.integers(1, 4) | st.integers(1, 60)
limits = st.just(NO_END) | st.integers(1, 6)


@st.composite
def triggers(draw: st.DrawFn) -> Trigger:
    after = draw(sequences)
    return Trigger(after, draw(sequences), each=bool(after) and draw(st.booleans()), tokens=draw(limits))


def grown(trigger: Trigger, tokens: Sequence[int], size: int) -> Windows:
    """The windows after these tokens, which arrive in parts of this size."""
    windows = Windows(trigger)
    for start in range(0, len(tokens), size):
        windows.extend(tokens[start : start + size])
    assert windows.num_tokens == len(tokens)
    return windows


def is_inside(trigger: Trigger, tokens: Sequence[int], position: int) -> bool:
    scope = {"each": trigger.each, "tokens": trigger.tokens}
    scope |= {name: list(part) for name, part in (("after", trigger.after), ("until", trigger.until)) if part}
    return window_at(scope, tokens, position) is not None


def places_of(sequence: Sequence[int], tokens: Sequence[int]) -> list[int]:
    """Where the sequence ends."""
    size = len(sequence)
    return [end - 1 for end in range(size, len(tokens) + 1) if size and list(tokens[end - size : end]) == [*sequence]]


@settings(max_examples=400)
@given(triggers(), texts, sizes, st.integers(0, 8))
def test_within(trigger: Trigger, tokens: list[int], size: int, length: int) -> None:
    """From every position on. Positions after the last token are inside if its window stays open."""
    known = [*tokens, *[OTHER] * AHEAD]
    windows = grown(trigger, tokens, size)
    inside = [is_inside(trigger, known, p) for p in range(len(known))]
    event(f"inside {any(inside)}, outside {not all(inside)}")
    for start in range(len(known)):
        end = min(start + length, len(known))
        found = [p for first, last in windows.within(start, end) for p in range(first, last)]
        assert found == [p for p in range(start, end) if inside[p]]


@pytest.mark.parametrize("few", [0, trigger_module.FEW_TOKENS], ids=["NumPy", "Python"])
def test_all_short_texts_in_parts(monkeypatch: pytest.MonkeyPatch, few: int) -> None:
    """Sequences that overlap each other and the edges of parts; both ways of searching."""
    monkeypatch.setattr(trigger_module, "FEW_TOKENS", few)
    words = [word for size in range(1, 4) for word in product((1, 2), repeat=size)]
    for after, until in product(words, words):
        trigger = Trigger(after, until, each=True)
        for tokens in product((1, 2), repeat=5):
            inside = [is_inside(trigger, tokens, p) for p in range(5)]
            for size in (2, 3):
                spans = grown(trigger, tokens, size).within(0, 5)
                found = [p for first, last in spans for p in range(first, last)]
                assert found == [p for p in range(5) if inside[p]], (trigger, tokens, size)


@settings(max_examples=400)
@given(triggers(), texts, sizes)
def test_state(trigger: Trigger, tokens: list[int], size: int) -> None:
    opened = places_of(trigger.after, tokens[:-1]) if trigger.after else [-1]
    closed = places_of(trigger.until, tokens)
    place = -1 if trigger.each else 0
    expected = (opened[place] if opened else NEVER, closed[-1] if closed else NEVER)
    assert grown(trigger, tokens, size).state == expected


@pytest.mark.parametrize("trigger", [Trigger((1, 2), (3,), each=True, tokens=7), Trigger((), (5, 6)), Trigger((4,))])
def test_the_wire_form_is_plain_and_complete(trigger: Trigger) -> None:
    assert Trigger.from_wire(trigger.to_wire()) == trigger
    assert all(type(part) in (list, bool, int) for part in trigger.to_wire())


def test_many_windows_cost_no_more_than_their_number() -> None:
    """A client chooses how many there are: each KV block of a long prompt looks only at its own."""
    windows = Windows(Trigger(after=(5,), each=True))
    windows.extend([5] * 200_000)
    start = time.perf_counter()
    found = sum(len(windows.within(first, first + 16)) for first in range(0, 200_000, 16))
    assert found == 199_999
    assert time.perf_counter() - start < 5.0  # the walk from the last window back took minutes
    assert windows.num_bytes <= 16 * 200_000
