"""What a parsed request says about steering; two ways at once, and reserved keys, are errors."""

from __future__ import annotations

from typing import Any

import pytest

from steer_engine.api.request_field import steering_of
from steer_engine.errors import SteeringRequestError

SPEC: dict[str, Any] = {"edits": [{"vector": "cheerful"}]}


@pytest.mark.parametrize(
    ("body", "requested"),
    [
        ({}, None),
        ({"steering": None}, None),
        ({"steering": False}, False),
        ({"steering": SPEC}, SPEC),
        ({"vllm_xargs": {"steering": "{}"}}, "{}"),
        ({"steering": None, "vllm_xargs": {"steering": "{}"}}, "{}"),
        ({"steering": SPEC, "vllm_xargs": {"steering": None}}, SPEC),
        ({"steering": SPEC, "vllm_xargs": None}, SPEC),
        ({"vllm_xargs": {"steering": "null"}}, None),
        ({"vllm_xargs": {"steering": " false\n"}}, False),
        ({"steering": SPEC, "vllm_xargs": {"steering": "null"}}, SPEC),
        ({"steering": "null"}, None),
        ({"steering": "false"}, False),
        ({"vllm_xargs": {"session_id": "a"}}, None),
        ({"messages": [{"role": "user", "content": '"steering": {}'}]}, None),
    ],
)
def test_where_steering_is_found(body: dict[str, Any], requested: Any) -> None:
    assert steering_of(body) == requested


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"steering": SPEC, "vllm_xargs": {"steering": "{}"}}, "steering"),
        ({"steering": False, "vllm_xargs": {"steering": "{}"}}, "steering"),
        ({"steering": SPEC, "vllm_xargs": {"steering": "false"}}, "steering"),
        ({"vllm_xargs": {"steering": 3}}, "vllm_xargs.steering"),
        ({"vllm_xargs": {"steering": ["a"]}}, "vllm_xargs.steering"),
        ({"vllm_xargs": {"steering": False}}, "vllm_xargs.steering"),
        ({"vllm_xargs": {"_steer_program": "x"}}, "vllm_xargs._steer_program"),
        ({"vllm_xargs": {"_steer": "x"}, "steering": SPEC}, "vllm_xargs._steer"),
    ],
)
def test_refused_places(body: dict[str, Any], param: str) -> None:
    with pytest.raises(SteeringRequestError) as refused:
        steering_of(body)
    assert refused.value.param == param
    assert refused.value.status == 400


def test_a_long_reserved_key_is_not_echoed_whole() -> None:
    with pytest.raises(SteeringRequestError) as refused:
        steering_of({"vllm_xargs": {"_steer" + "x" * 10_000: 1}})
    assert len(refused.value.message) < 300
