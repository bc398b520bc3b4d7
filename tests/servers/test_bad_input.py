"""A client's mistake is its own error, named by `param`, before any byte of an answer; the next request is served."""

from __future__ import annotations

import json
from typing import Any

import pytest
from helpers.asking import CARRYING, MODEL, STRONG, Endpoint
from helpers.server_process import FINISHED, Server

EDIT = STRONG["edits"][0]

BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown vector": ({"steering": {"edits": [{"vector": "nobody"}]}}, 404, "steering.edits[0].vector"),
    "unknown digest": ({"steering": {"edits": [{"vector": "sha256:" + "0" * 64}]}}, 404, "steering.edits[0].vector"),
    "a path as a name": ({"steering": {"edits": [{"vector": "../east"}]}}, 404, "steering.edits[0].vector"),
    "second edit unknown": ({"steering": {"edits": [EDIT, {"vector": "nobody"}]}}, 404, "steering.edits[1].vector"),
    "unknown preset": ({"steering": {"preset": "nobody"}}, 404, "steering.preset"),
    "block out of range": ({"steering": {"edits": [EDIT | {"blocks": "8-40"}]}}, 400, "steering.edits[0].blocks"),
    "block without a direction": ({"steering": {"edits": [EDIT | {"blocks": [2]}]}}, 400, "steering.edits[0].blocks"),
    "negative block": ({"steering": {"edits": [EDIT | {"blocks": -1}]}}, 400, "steering.edits[0].blocks"),
    "other hidden size": ({"steering": {"edits": [{"vector": "narrow"}]}}, 400, "steering.edits[0].vector"),
    "scale NaN": ({"steering": {"edits": [EDIT | {"scale": float("nan")}]}}, 400, "steering.edits[0].scale"),
    "scale infinite": ({"steering": {"edits": [EDIT | {"scale": float("-inf")}]}}, 400, "steering.edits[0].scale"),
    "scale absurd": ({"steering": {"edits": [EDIT | {"scale": 1e30}]}}, 400, "steering.edits[0].scale"),
    "scale huge integer": ({"steering": {"edits": [EDIT | {"scale": 10**400}]}}, 400, "steering.edits[0].scale"),
    "scale a string": ({"steering": {"edits": [EDIT | {"scale": "1.5"}]}}, 400, "steering.edits[0].scale"),
    "scale a boolean": ({"steering": {"edits": [EDIT | {"scale": True}]}}, 400, "steering.edits[0].scale"),
    "unknown operation": ({"steering": {"edits": [EDIT | {"op": "multiply"}]}}, 400, "steering.edits[0].op"),
    "unknown scope": ({"steering": {"edits": [EDIT | {"scope": "answer"}]}}, 400, "steering.edits[0].scope"),
    "scope without its tags": ({"steering": {"edits": [EDIT | {"scope": "thinking"}]}}, 400, "steering.edits[0].scope"),
    "trigger beyond the vocabulary": (
        {"steering": {"edits": [EDIT | {"scope": {"after": [1, 49152]}}]}}, 400, "steering.edits[0].scope.after",
    ),
    "trigger of another tokenisation": (
        {"steering": {"edits": [EDIT | {"scope": {"until": "\n\n"}}]}}, 400, "steering.edits[0].scope.until",
    ),
    "negative answer window": (
        {"steering": {"edits": [EDIT | {"scope": {"from": "generation", "start": -1}}]}},
        400, "steering.edits[0].scope.start",
    ),
    "schedule of another kind": (
        {"steering": {"edits": [EDIT | {"schedule": {"kind": "cosine", "over": 3, "to": 0}}]}},
        400, "steering.edits[0].schedule.kind",
    ),
    "condition on an unknown vector": (
        {"steering": {**STRONG, "when": {"vector": "nobody", "above": 0}}}, 404, "steering.when.vector",
    ),
    "condition on another hidden size": (
        {"steering": {**STRONG, "when": {"any": [{"vector": "narrow", "above": 0}]}}},
        400, "steering.when.any[0].vector",
    ),
    "condition decided too late": (
        {"steering": {**STRONG, "when": {"vector": "west", "above": 0}}}, 400, "steering.when.blocks",
    ),
    "unknown key of an edit": ({"steering": {"edits": [EDIT | {"layer": 3}]}}, 400, "steering.edits[0].layer"),
    "unknown key": ({"steering": {**STRONG, "vectors": []}}, 400, "steering.vectors"),
    "no edits": ({"steering": {"edits": []}}, 400, "steering.edits"),
    "too many edits": ({"steering": {"edits": [EDIT] * 9}}, 400, "steering.edits"),
    "no vector": ({"steering": {"edits": [{"scale": 1.0}]}}, 400, "steering.edits[0].vector"),
    "empty object": ({"steering": {}}, 400, "steering"),
    "edits and preset": ({"steering": {**STRONG, "preset": "calm"}}, 400, "steering"),
    "a list": ({"steering": [EDIT]}, 400, "steering"),
    "a number": ({"steering": 3}, 400, "steering"),
    "true": ({"steering": True}, 400, "steering"),
    "a name": ({"steering": "east"}, 400, "steering"),
    "xargs not JSON": ({"vllm_xargs": {"steering": "{edits"}}, 400, "steering"),
    "xargs a number": ({"vllm_xargs": {"steering": 3}}, 400, "vllm_xargs.steering"),
    "specified twice": ({"steering": STRONG, "vllm_xargs": {"steering": json.dumps(STRONG)}}, 400, "steering"),
    "reserved key": ({"vllm_xargs": {"_steer_program": "x"}}, 400, "vllm_xargs._steer_program"),
    "reserved key beside steering": (
        {"steering": STRONG, "vllm_xargs": {"_steer_program": "x"}}, 400, "vllm_xargs._steer_program",
    ),
    "in extra_body": ({"extra_body": {"steering": STRONG}}, 400, "extra_body"),
    "text in extra_body": ({"extra_body": json.dumps({"steering": STRONG})}, 400, "extra_body"),
    "in metadata": ({"metadata": {"steering": STRONG}}, 400, "metadata"),
    "in chat_template_kwargs": ({"chat_template_kwargs": {"steering": STRONG}}, 400, "chat_template_kwargs"),
    "zero": ({"steering": 0}, 400, "steering"),
    "minus zero": ({"steering": -0.0}, 400, "steering"),
}  # fmt: skip

table = pytest.mark.parametrize(("fields", "status", "param"), BAD.values(), ids=BAD.keys())


@pytest.fixture(scope="module", autouse=True)
def _nothing_reached_the_engine(server: Server) -> Any:
    before = server.metric(FINISHED)
    yield
    good = [CARRYING[path].ask(server, steering=STRONG) for path in ("/v1/chat/completions", "/v1/completions")]
    assert [answer.status_code for answer in good] == [200, 200]
    assert server.metric(FINISHED) == before + 2


def refused(server: Server, endpoint: Endpoint, fields: dict[str, Any], **more: Any) -> tuple[int, dict[str, Any]]:
    # json.dumps writes NaN and Infinity, which Python's own readers (FastAPI's too) take.
    answer = server.post(endpoint.path, json.dumps(endpoint.body | fields | more).encode())
    assert "X-Steering" not in answer.headers
    assert answer.headers["content-type"].startswith("application/json")
    return answer.status_code, answer.json()["error"]


@table
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_bad_steering(server: Server, path: str, stream: bool, fields: dict[str, Any], status: int, param: str) -> None:
    found, error = refused(server, CARRYING[path], fields, stream=stream)
    assert (found, error["param"], error["code"]) == (status, param, status), error
    assert error["type"] == {400: "BadRequestError", 404: "NotFoundError"}[status]
    assert error["message"]


@table
@pytest.mark.parametrize("path", ["/v1/messages", "/invocations", "/v1/chat/completions/batch"])
def test_bad_steering_on_the_other_endpoints(
    server: Server, path: str, fields: dict[str, Any], status: int, param: str
) -> None:
    found, error = refused(server, CARRYING[path], fields)
    assert found == status
    # Anthropic's error has no param.
    assert error["param"] == param


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_beam_search_is_refused(server: Server, path: str) -> None:
    found, error = refused(server, CARRYING[path], {"steering": STRONG, "use_beam_search": True, "n": 2})
    assert (found, error["param"]) == (400, "use_beam_search")


def test_an_unknown_model_is_vllm_s_own_error(server: Server) -> None:
    found, error = refused(server, CARRYING["/v1/chat/completions"], {"steering": STRONG, "model": "gpt-9"})
    assert (found, error["param"]) == (404, "model")


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_long_input_is_not_echoed_and_no_path_is_shown(server: Server, path: str) -> None:
    for name in ("x" * 100_000, "é" * 500, "\u0000", "..%2f..%2fetc"):
        _, error = refused(server, CARRYING[path], {"steering": {"edits": [{"vector": name}]}})
        assert len(error["message"]) < 600
        assert "/" not in error["message"].replace(name[:200], "").replace("..%2f", "")


def test_a_deeply_nested_spec_is_an_error_and_not_a_crash(server: Server) -> None:
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 1, "steering": 0})
    for depth in (50, 100_000):
        nested = body.replace('"steering": 0', '"steering": ' + "[" * depth + "]" * depth)
        assert server.post("/v1/completions", nested.encode()).status_code == 400
