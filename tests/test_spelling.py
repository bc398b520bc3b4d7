"""Closeness of names."""

from __future__ import annotations

import itertools
import time

import pytest

from steer_engine.spelling import MAX_COMPARED, closest, edit_distance


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ("steering", "steering", 0), ("sterring", "steering", 1), ("steerign", "steering", 1),
        ("stering", "steering", 1),
        ("steeering", "steering", 1), ("string", "steering", 2), ("streeing", "steering", 2), ("steer", "steering", 3),
        ("", "abc", 3), ("abc", "", 3), ("ab", "ba", 1),
    ],
)  # fmt: skip
def test_edit_distance(a: str, b: str, expected: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == expected


def test_edit_distance_is_0_for_equal_words_only() -> None:
    words = ["".join(word) for word in itertools.product("abc", repeat=3)]
    for a, b in itertools.product(words, words):
        assert (edit_distance(a, b) == 0) == (a == b)


@pytest.mark.parametrize(
    ("name", "best"),
    [("clam", "calm"), ("chearful", "cheerful"), ("Loud", "loud"), ("pirates", "pirate"),
     ("smollm-135m", "smollm2-135m")],
)  # fmt: skip
def test_the_closest_name_is_first(name: str, best: str) -> None:
    names = ["angry", "calm", "cheerful", "loud", "pirate", "sad", "smollm2-135m"]
    assert closest(name, names, 3)[0] == best
    assert len(closest(name, names, 3)) == 3
    assert closest(name, [], 3) == []


def test_the_cost_of_a_misspelled_name_is_bounded() -> None:
    names = (f"{number:x}" * 8 for number in itertools.count())
    began = time.process_time()
    assert len(closest("x" * 64, names, 8)) == 8
    assert time.process_time() - began < 0.5
    assert next(names) == f"{MAX_COMPARED:x}" * 8 or next(names), "an endless list of names is not read to its end"
