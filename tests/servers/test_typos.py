"""A field that is nearly `steering` is refused by every endpoint; no field of vLLM's own schema is taken for one."""

from __future__ import annotations

import pytest
from helpers.asking import CARRYING, STRONG, Endpoint
from helpers.server_process import Server

from steer_engine.api.body_search import search_fields

endpoints = pytest.mark.parametrize("endpoint", CARRYING.values(), ids=lambda each: each.path)


@endpoints
@pytest.mark.parametrize("field", ["steer", "sterring", "control_vectors", "steering_vectors"])
def test_a_typo_is_refused_and_the_right_field_named(server: Server, endpoint: Endpoint, field: str) -> None:
    answer = endpoint.ask(server, **{field: STRONG})
    assert answer.status_code == 400
    assert f"named 'steering', not '{field}'" in answer.text


@endpoints
def test_other_unknown_fields_are_as_before(server: Server, endpoint: Endpoint) -> None:
    answer = endpoint.ask(server, string="x", streaming=1, storing=True, unknown=3)
    assert answer.status_code == 200, answer.text


def test_no_field_of_vllm_is_taken_for_a_typo(server: Server) -> None:
    schemas = server.get("/openapi.json").json()["components"]["schemas"]
    names = {name for schema in schemas.values() for name in schema.get("properties", {})} - {"steering"}
    assert len(names) > 150
    assert {"stream", "stop", "seed", "temperature", "structured_outputs", "cache_salt", "vllm_xargs"} <= names
    for name in names:
        assert search_fields({name: {"edits": []}}) is None, name
