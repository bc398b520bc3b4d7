"""The demo passes only if sentiment shifts significantly and text is intact, on prompts not used for tuning."""

from __future__ import annotations

import pytest

from steer_engine.demo.scoring import DEV, HELD_OUT, SHOWN, Shift, Side, find_faults, shift, words_of

GLOOMY = tuple(f"It was a terrible and hopeless day number {number}, and I hated it." for number in range(20))
CHEERFUL = tuple(f"It was a wonderful and lovely day number {number}, and I adored it." for number in range(20))


def side(scale: float, answers: tuple[str, ...]) -> Side:
    return Side(scale=scale, answers=answers)


def test_held_out_prompts_are_disjoint_from_the_others() -> None:
    assert len(HELD_OUT) == 20
    assert len({*DEV, *SHOWN, *HELD_OUT}) == len(DEV) + len(SHOWN) + len(HELD_OUT)


def test_a_clear_shift_is_significant() -> None:
    found = shift("up", side(-1, GLOOMY), side(1, CHEERFUL))
    assert found.mean > 1
    assert found.significant


def test_a_shift_the_wrong_way_is_not() -> None:
    found = shift("up", side(-1, CHEERFUL), side(1, GLOOMY))
    assert found.mean < -1
    assert not found.significant


def test_no_change_is_not() -> None:
    assert shift("up", side(-1, GLOOMY), side(1, GLOOMY)) == Shift(name="up", mean=0.0, p=1.0)


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError, match="shorter"):
        shift("up", side(-1, GLOOMY), side(1, CHEERFUL[:-1]))


def test_repetition_is_the_share_of_distinct_words() -> None:
    assert side(0, ("one two three four", "so so so so")).distinct == pytest.approx((1 + 0.25) / 2)
    assert side(0, ("", "one two")).length == 1
    assert words_of("It's ONE, two-three.") == ["it's", "one", "two", "three"]


@pytest.mark.parametrize(
    ("answers", "fault"),
    [
        (("happy " * 12,) * 20, "repeat themselves"),
        (("Great.",) * 20, "are too short"),
        (("",) * 20, "repeat themselves"),
    ],
)
def test_broken_text_is_a_fault_however_cheerful(answers: tuple[str, ...], fault: str) -> None:
    plain, high = side(0, GLOOMY), side(1, answers)
    faults = find_faults(plain, [high], [Shift(name="up", mean=1.0, p=1e-6)])
    assert any(fault in one for one in faults)


def test_sound_text_and_shift_have_no_fault() -> None:
    plain, high = side(0, GLOOMY), side(1, CHEERFUL)
    assert find_faults(plain, [high], [shift("up", plain, high)]) == []


def test_chance_is_a_fault() -> None:
    (fault,) = find_faults(side(0, GLOOMY), [], [Shift(name="up", mean=0.1, p=0.2)])
    assert fault == "the shift up is +0.10 with p = 0.2, not a rise with p < 0.01"
