"""`BASE:PRESET`, where served names may hold colons themselves."""

from __future__ import annotations

import pytest

from steer_engine.api.request_field import split_model

SERVED = {"base", "org/model:v1", "org/model", "lora"}


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("base:calm", ("base", "calm")),
        ("lora:calm", ("lora", "calm")),
        ("org/model:v1", None),
        ("org/model:v1:calm", ("org/model:v1", "calm")),
        ("org/model:v2:calm", ("org/model", "v2:calm")),
        ("org/model:calm", ("org/model", "calm")),
        ("base", None),
        ("base:", None),
        (":calm", None),
        (":", None),
        ("other:calm", None),
        ("", None),
        (None, None),
        ("base:calm:", ("base", "calm:")),
    ],
)
def test_the_longest_served_name_is_the_base(model: str | None, expected: tuple[str, str] | None) -> None:
    assert split_model(model, SERVED) == expected
