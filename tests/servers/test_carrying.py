"""Each endpoint of the allow-list steers, says so, and leaves others alone: a real server, a real model."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.asking import CARRYING, MODEL, STREAMING, STRONG, TOKENS_PATH, Endpoint, events
from helpers.server_process import Server

from steer_engine.api.middleware import CARRYING_PATHS
from steer_engine.vectors import ControlVector

endpoints = pytest.mark.parametrize("endpoint", CARRYING.values(), ids=lambda each: each.path)
streaming = pytest.mark.parametrize("endpoint", STREAMING, ids=lambda each: each.path)


def test_every_path_of_the_allow_list_is_tested_here() -> None:
    assert set(CARRYING) == CARRYING_PATHS


@endpoints
def test_steering_changes_greedy_text_repeatably_and_is_reported(
    server: Server, vectors: dict[str, ControlVector], endpoint: Endpoint
) -> None:
    plain = endpoint.ask(server)
    first = endpoint.ask(server, steering=STRONG)
    again = endpoint.ask(server, steering=STRONG)
    after = endpoint.ask(server)
    assert [plain.status_code, first.status_code, again.status_code] == [200, 200, 200], first.text
    assert endpoint.text(first.json()) != endpoint.text(plain.json())
    assert endpoint.text(first.json()) == endpoint.text(again.json())
    assert endpoint.text(after.json()) == endpoint.text(plain.json())

    assert first.headers["X-Steering"] == again.headers["X-Steering"]
    assert first.headers["X-Steering"].startswith("sha256:")
    for answer in (plain, after):
        assert "X-Steering" not in answer.headers
        assert "steering" not in answer.json()
    if endpoint.path == "/v1/messages":
        assert "steering" not in first.json()
        return
    reported = first.json()["steering"]
    assert reported["digest"] == first.headers["X-Steering"]
    (edit,) = reported["edits"]
    assert edit["name"] == "east"
    assert edit["vector"] == vectors["east"].digest
    assert edit["scale"] == 60.0
    assert edit["blocks"] == list(range(8, 22))


@endpoints
def test_as_a_json_string_in_vllm_xargs(server: Server, endpoint: Endpoint) -> None:
    spec = '{"edits": [{"vector": "east", "scale": 60.0, "blocks": "8-21"}]}'
    direct = endpoint.ask(server, steering=STRONG)
    by_xargs = endpoint.ask(server, vllm_xargs={"steering": spec})
    assert by_xargs.status_code == 200, by_xargs.text
    assert by_xargs.headers["X-Steering"] == direct.headers["X-Steering"]
    assert endpoint.text(by_xargs.json()) == endpoint.text(direct.json())


@endpoints
@pytest.mark.parametrize("value", [None, False])
def test_null_and_false_are_not_steered(server: Server, endpoint: Endpoint, value: Any) -> None:
    answer = endpoint.ask(server, steering=value)
    assert answer.status_code == 200, answer.text
    assert "X-Steering" not in answer.headers
    assert "steering" not in answer.json()
    assert endpoint.text(answer.json()) == endpoint.text(endpoint.ask(server).json())


@endpoints
def test_an_edit_that_does_nothing_is_reported_too(server: Server, endpoint: Endpoint) -> None:
    answer = endpoint.ask(server, steering={"edits": [{"vector": "east", "scale": 0}]})
    assert answer.status_code == 200, answer.text
    assert answer.headers["X-Steering"].startswith("sha256:")
    if endpoint.path != "/v1/messages":
        assert answer.json()["steering"]["edits"] == []
    assert endpoint.text(answer.json()) == endpoint.text(endpoint.ask(server).json())


@streaming
def test_the_final_chunks_of_a_stream_tell(server: Server, endpoint: Endpoint) -> None:
    whole = endpoint.ask(server, steering=STRONG).json()
    answer = endpoint.ask(server, steering=STRONG, stream=True)
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["X-Steering"] == whole["steering"]["digest"]
    chunks = events(answer)
    if endpoint.path == "/v1/responses":
        # From 0.33 on, vLLM calls an answer that reaches its last token incomplete.
        last = [chunk["response"] for chunk in chunks if chunk["type"] in ("response.completed", "response.incomplete")]
        assert [each["steering"] for each in last] == [whole["steering"]]
        assert endpoint.text(last[0]) == endpoint.text(whole)
        return
    final = [chunk for chunk in chunks if chunk["choices"] and chunk["choices"][0]["finish_reason"]]
    assert [chunk["steering"] for chunk in final] == [whole["steering"]]
    assert not any("steering" in chunk for chunk in chunks if chunk not in final)
    pieces = [chunk["choices"][0] for chunk in chunks]
    if endpoint.path == TOKENS_PATH:
        assert str([token for piece in pieces for token in piece["token_ids"]]) == endpoint.text(whole)
        return
    text = "".join(piece["text"] if "text" in piece else piece["delta"].get("content") or "" for piece in pieces)
    assert text == endpoint.text(whole)


@streaming
def test_an_unsteered_stream_says_nothing_of_steering(server: Server, endpoint: Endpoint) -> None:
    answer = endpoint.ask(server, stream=True)
    assert answer.status_code == 200
    assert "X-Steering" not in answer.headers
    assert "steering" not in answer.text


def test_a_messages_stream_has_the_header(server: Server) -> None:
    answer = CARRYING["/v1/messages"].ask(server, steering=STRONG, stream=True)
    assert answer.headers["X-Steering"].startswith("sha256:")
    assert "message_stop" in answer.text


def test_several_prompts_and_choices_of_one_request_are_all_steered(server: Server) -> None:
    endpoint = CARRYING["/v1/completions"]
    one = endpoint.text(endpoint.ask(server, steering=STRONG).json())
    both = endpoint.ask(server, steering=STRONG, prompt=[endpoint.body["prompt"]] * 2).json()
    assert [choice["text"] for choice in both["choices"]] == [one, one]
    several = endpoint.ask(server, steering=STRONG, n=2, temperature=1e-3, stream=True)
    final = [chunk for chunk in events(several) if chunk["choices"][0]["finish_reason"]]
    assert sorted(chunk["choices"][0]["index"] for chunk in final) == [0, 1]
    assert all("steering" in chunk for chunk in final)


def test_a_stored_response_still_tells(server: Server) -> None:
    # vLLM keeps background responses only with VLLM_ENABLE_RESPONSES_API_STORE; without, the answer itself tells.
    answer = CARRYING["/v1/responses"].ask(server, steering=STRONG, store=False)
    assert answer.json()["steering"]["digest"] == answer.headers["X-Steering"]


def test_tokens_in_tokens_out_by_preset(server: Server) -> None:
    endpoint = CARRYING[TOKENS_PATH]
    by_field = endpoint.ask(server, steering=STRONG)
    for fields in ({"steering": {"preset": "loud"}}, {"model": f"{MODEL}:loud"}):
        answer = endpoint.ask(server, **fields)
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Steering"] == by_field.headers["X-Steering"]
        assert answer.headers["X-Steering-Preset"] == "loud"
        assert endpoint.text(answer.json()) == endpoint.text(by_field.json())
    assert answer.json()["model"] == f"{MODEL}:loud"


def test_tokens_in_text_out_is_reported_too(server: Server) -> None:
    answer = CARRYING[TOKENS_PATH].ask(server, steering=STRONG, output_mode="text")
    assert answer.status_code == 200, answer.text
    assert answer.json()["steering"]["digest"] == answer.headers["X-Steering"]


def test_the_openapi_page_says_that_tokens_in_tokens_out_takes_the_field(server: Server) -> None:
    assert "steering" in server.get("/openapi.json").json()["components"]["schemas"]["GenerateRequest"]["properties"]


@pytest.mark.parametrize("extra", [{"steering": STRONG}, {"steering": '{"edits": []}'}, {"_steer_program": {}}])
def test_tokens_in_tokens_out_takes_nothing_from_extra_args(server: Server, extra: dict[str, Any]) -> None:
    endpoint = CARRYING[TOKENS_PATH]
    params = endpoint.body["sampling_params"] | {"extra_args": extra}
    answer = endpoint.ask(server, sampling_params=params)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == "sampling_params"
    assert endpoint.ask(server, sampling_params=params | {"extra_args": {"other": 1}}).status_code == 200


def test_names_are_resolved_to_content(server: Server, vectors: dict[str, ControlVector]) -> None:
    endpoint = CARRYING["/v1/chat/completions"]
    by_name = endpoint.ask(server, steering=STRONG)
    edit = STRONG["edits"][0] | {"vector": vectors["east"].digest}
    by_digest = endpoint.ask(server, steering={"edits": [edit]})
    assert by_digest.headers["X-Steering"] == by_name.headers["X-Steering"]
    assert "name" not in by_digest.json()["steering"]["edits"][0]
    other = endpoint.ask(server, steering={"edits": [STRONG["edits"][0] | {"vector": "west"}]})
    assert other.headers["X-Steering"] != by_name.headers["X-Steering"]
