from __future__ import annotations

import pytest

from steer_engine.derive.capture_config import Position
from steer_engine.errors import DerivationError


@pytest.mark.parametrize(
    ("rule", "capture_position", "includes_first"),
    [
        ("last", "last", False),
        ("mean", "all", True),
        ("all", "all", True),
        ("-2", [-2], False),
        ("0,3,-1", [0, 3, -1], False),
    ],
)
def test_rules(rule: str, capture_position: str | list[int], includes_first: bool) -> None:
    position = Position(rule)
    assert position.capture_position == capture_position
    assert position.includes_first is includes_first
    assert str(position) == rule


@pytest.mark.parametrize("rule", ["", "first", "1,", "1;2", "--1", "1.0", "last\n", "٣", "1" * 7])
def test_other_rules_are_refused(rule: str) -> None:
    with pytest.raises(DerivationError, match="is none of 'last', 'mean'"):
        Position(rule)


def test_a_text_must_be_long_enough() -> None:
    assert Position("last").fits(1)
    assert not Position("last").fits(0)
    assert Position("2,-3").fits(3)
    assert not Position("3").fits(3)
    assert not Position("-4").fits(3)
