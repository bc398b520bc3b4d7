"""What was tuned on is not what is scored on."""

from __future__ import annotations

from steer_engine.demo.scoring import DEV, HELD_OUT, SHOWN


def test_twenty_held_out_prompts_apart_from_the_others() -> None:
    assert len(HELD_OUT) == 20
    assert len({*DEV, *SHOWN, *HELD_OUT}) == len(DEV) + len(SHOWN) + len(HELD_OUT)
