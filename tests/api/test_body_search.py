"""Steering in a place that nothing reads is refused, in whatever spelling; the client's own keys are left alone."""

from __future__ import annotations

import json
import sys
import time
import unicodedata
from typing import Any

import httpx
import pytest

from steer_engine.api import answers
from steer_engine.api.body_search import Found, search_body, search_fields
from steer_engine.api.middleware import Receive, Scope, Send, SteeringMiddleware
from steer_engine.errors import SteeringRequestError

SPEC: dict[str, Any] = {"edits": [{"vector": "cheerful"}]}
TEXT = json.dumps(SPEC)
FIELD = {"steering": SPEC}

MISPLACED: list[tuple[dict[str, Any], str]] = [
    ({"extra_body": FIELD}, "extra_body"),
    ({"extra_body": json.dumps(FIELD)}, "extra_body"),
    ({"extra_body": {"vllm_xargs": {"steering": TEXT}}}, "extra_body"),
    ({"extra_args": {"steering": TEXT}}, "extra_args"),
    ({"extra_args": {"_steer_program": {}}}, "extra_args"),
    ({"extra_params": FIELD}, "extra_params"),
    ({"sampling_params": {"extra_args": {"steering": TEXT}}}, "sampling_params"),
    ({"sampling_params": {"extra_args": {"_steer_program": 1}}}, "sampling_params"),
    ({"metadata": FIELD}, "metadata"),
    ({"metadata": {"steering": TEXT}}, "metadata"),
    ({"chat_template_kwargs": FIELD}, "chat_template_kwargs"),
    ({"chat_template_kwargs": {"Steering": SPEC}}, "chat_template_kwargs"),
    ({"model_kwargs": FIELD}, "model_kwargs"),
    ({"options": FIELD}, "options"),
    ({"options": {"steering": "calm"}}, "options"),
    ({"options": {"steering": 0}}, "options"),
    ({"parameters": {"more": [{"deep": FIELD}]}}, "parameters"),
    ({"kv_transfer_params": FIELD}, "kv_transfer_params"),
    ({"messages": [{"role": "user", "content": "hi"}, {"role": "user", "content": "x", **FIELD}]}, "messages[1]"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x", **FIELD}]}]}, "messages[0]"),
    ({"messages": [[{"role": "user", "content": "x", **FIELD}]]}, "messages[0]"),
    ({"input": [{"role": "user", "content": "x", **FIELD}]}, "input[0]"),
    ({"vllm_xargs": {"extra_args": FIELD}}, "vllm_xargs.extra_args"),
    ({"vllm_xargs": {"extra_args": json.dumps(FIELD)}}, "vllm_xargs.extra_args"),
    ({"hotwire": "[]"}, "hotwire"),
    ({"apply_steering_vectors": "[]"}, "apply_steering_vectors"),
    ({"extra_body": {"hotwire": "[]"}}, "extra_body"),
]

OWN: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": '{"steering": {"edits": []}}'}]},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "steering"}]}]},
    {"messages": [{"role": "assistant", "content": [{"type": "tool_use", "input": {"steering": {"angle": 3}}}]}]},
    {"messages": [{"role": "assistant", "tool_calls": [{"function": {"arguments": {"steering": 1}}}]}]},
    {"prompt": '{"steering": {"edits": []}}'},
    {"input": "steering"},
    {"tools": [{"function": {"parameters": {"properties": {"steering": {"type": "string"}}}}}]},
    {"tools": [{"input_schema": {"properties": {"steering": {}}, "required": ["steering"]}}]},
    {"response_format": {"json_schema": {"schema": {"properties": {"steering": {"type": "number"}}}}}},
    {"structured_outputs": {"json": {"properties": {"steering": {}}}}},
    {"text": {"format": {"schema": {"properties": {"steering": {}}}}}},
    {"extra_body": {"guided_json": {"properties": {"steering": {}}}}},
    {"sampling_params": {"guided_decoding": {"json": {"steering": 1}}}},
    {"options": {"json": {"$defs": {"steering": {}}}}},
    {"documents": [{"steering": "a wheel"}]},
    {"metadata": {"steering": "left"}},
    {"metadata": {"steering": "{angle: 3}", "hotwire": "turbo", "_steering_wheel": "x"}},
    {"extra_body": {"metadata": {"steering": "committee"}}, "litellm_metadata": {"steering": "committee"}},
    {"state": {"steering": "hard left"}, "questions": {"steering": {"type": "choice"}}},
    {"data": {"steering": [0.5]}},
    {"options": {"steering": None}, "metadata": {"steering": "null"}},
    {"extra_body": {"steering": False}},
    {"extra_body": "steering"},
    {"extra_body": '{"steering'},
    {"user": TEXT},
]


async def post(path: str, content: bytes, *, report: dict[str, Any] | None = None) -> httpx.Response:
    """The answer of the middleware before an endpoint that reports `report`."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        answers.begin_note().report = report
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    transport = httpx.ASGITransport(app=SteeringMiddleware(app))
    async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
        return await client.post(path, content=content)


@pytest.mark.parametrize(("body", "place"), MISPLACED)
async def test_a_place_that_nothing_reads_is_refused_and_named(body: dict[str, Any], place: str) -> None:
    answer = await post("/v1/chat/completions", json.dumps(body).encode())
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == place
    assert f"'{place}'" in error["message"]
    assert "top level" in error["message"]
    elsewhere = await post("/v1/embeddings", json.dumps(body).encode())
    assert elsewhere.status_code == 400
    assert "/v1/embeddings" in elsewhere.json()["error"]["message"]


@pytest.mark.parametrize(("body", "place"), MISPLACED)
def test_the_fields_of_a_parsed_request_give_the_same(body: dict[str, Any], place: str) -> None:
    """Where there is no middleware, as in vLLM's own batch runner."""
    assert search_fields(body) == Found(place, misplaced=True)


@pytest.mark.parametrize("body", OWN)
async def test_the_client_s_own_keys_and_texts_are_left_alone(body: dict[str, Any]) -> None:
    assert search_fields(body) is None
    assert (await post("/v1/chat/completions", json.dumps(body).encode())).status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b'{"metadata": {"steering": {"edits": []}}, "metadata": {}}',
        b'{"metadata": {"steering": {"edits": []}, "steering": null}}',
        b'{"vllm_xargs": {"hotwire": "[]", "hotwire": null}}',
        b'{"steering": {"edits": []}, "steering": null}',
    ],
)
async def test_a_copy_that_a_parser_would_drop_counts(content: bytes) -> None:
    answer = await post("/v1/chat/completions", content)
    assert answer.status_code == 400, "the last copy specifies no steering"


def test_extra_arguments_may_be_text() -> None:
    """Speech endpoints read them from a form; elsewhere vLLM refuses text."""
    assert search_body(json.dumps({"vllm_xargs": json.dumps({"steering": TEXT})}).encode()) is not None


@pytest.mark.parametrize(
    "key",
    ["Steering", "STEERING ", "\u017fteering", "\uff53teering", "\U0001d42c\U0001d42d\U0001d41e\U0001d41e\U0001d42b"
     "\U0001d422\U0001d427\U0001d420", "\ufb06eering", "steer\u33ccg", "\u200bsteering", "steering\ufeff",
     "\u24e2\u24e3\u24d4\u24d4\u24e1\u24d8\u24dd\u24d6"],
)  # fmt: skip
@pytest.mark.parametrize("ascii_only", [True, False])
async def test_a_misspelled_field_is_refused(key: str, ascii_only: bool) -> None:
    answer = await post("/v1/completions", json.dumps({key: SPEC}, ensure_ascii=ascii_only).encode())
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "steering"


def test_every_character_that_folds_to_a_letter_of_the_field_is_looked_at() -> None:
    for point in range(128, sys.maxunicode + 1):
        letter = chr(point)
        if unicodedata.category(letter) == "Cs":
            continue
        folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", letter).casefold())
        if folded in "steering" and folded:
            key = "steering".replace(folded, letter, 1)
            with pytest.raises(SteeringRequestError):
                search_body(json.dumps({key: SPEC}, ensure_ascii=False).encode())


async def test_an_unsteered_answer_to_a_body_that_asks_for_steering_is_replaced() -> None:
    """A check that has run and found nothing is no proof: the answer must say what was applied."""
    assert (await post("/v1/completions", json.dumps(FIELD).encode())).status_code == 400
    report = {"digest": "sha256:ab", "edits": []}
    assert (await post("/v1/completions", json.dumps(FIELD).encode(), report=report)).status_code == 200


@pytest.mark.parametrize(
    "content",
    [
        b'{"x":"steer","y":[' + b'{"a":1},' * 2**19 + b"{}]}",
        b'{"x":"steer","y":' + b'{"a":' * 400 + b"1" + b"}" * 400 + b',"z":[' + b'"{",' * 2**20 + b'"{"]}',
        b'{"x":"steer",' + b",".join(b'"key%d":{}' % i for i in range(2**18)) + b"}",
        b'{"x":"steer","k' + "\u0301\u0316".encode() * 2**20 + b'":1}',
        '{"\uff53":"'.encode() + "\u00e9".encode() * 2**22 + b'"}',
        b'{"extra_body":"' + b"{" * 2**22 + b'","x":"steer"}',
    ],
    ids=["objects", "texts", "keys", "combining", "text", "braces"],
)
def test_the_search_takes_little_longer_than_parsing(content: bytes) -> None:
    began = time.process_time()
    json.loads(content)
    parsing = time.process_time() - began
    began = time.process_time()
    assert search_body(content) is None
    assert time.process_time() - began < 6 * parsing + 0.5


@pytest.mark.parametrize("deep", ["[" * 50_000 + "]" * 50_000, '{"a":' * 50_000 + "1" + "}" * 50_000])
def test_a_body_that_mentions_steering_and_cannot_be_searched_is_refused(deep: str) -> None:
    """vLLM's wrapper of /invocations would answer it with a 500."""
    with pytest.raises(SteeringRequestError, match="nested too deeply.*flatter") as raised:
        search_body(f'{{"steering": {TEXT}, "metadata": {deep}}}'.encode())
    assert raised.value.param == "body"
    assert search_body(f'{{"prompt": "x", "metadata": {deep}}}'.encode()) is None, "the parser of vLLM decides"


TYPOS = (
    "steer", "steered", "sterring", "stering", "steerign", "seteering", "steerings", "streering", "Sterring",
    "steeringg", "steer_vector", "steer-vectors", "steering_vectors", "steeringVectors", "control_vectors",
    "controlVector", "activation_steering", "_steering", "sterring_vectors", "steering_preset", " stearing",
)  # fmt: skip

NO_TYPOS = (
    "stream", "stop", "seed", "store", "string", "strings", "streaming", "starting", "storing", "scoring",
    "string_format", "service_tier", "vectors", "preset", "edits", "steep", "engine", "sterile",
)  # fmt: skip
"""Fields that vLLM or other clients' servers may know, or not: what is unknown stays ignored."""


@pytest.mark.parametrize("key", TYPOS)
async def test_a_field_with_a_typo_or_another_name_is_refused_and_the_right_one_named(key: str) -> None:
    answer = await post("/v1/completions", json.dumps({"prompt": "x", key: SPEC}).encode())
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert error["param"] == "steering"
    assert f"named 'steering', not {key!r}" in error["message"]
    assert '{"edits": [{"vector": NAME}]}' in error["message"]
    for value in (TEXT, {"preset": "calm"}, ["calm"], "calm", 1.5, True, False):
        with pytest.raises(SteeringRequestError, match="named 'steering'"):
            search_body(json.dumps({"prompt": "x", key: value}).encode())
        with pytest.raises(SteeringRequestError, match="named 'steering'"):
            search_fields({"prompt": "x", key: value})


@pytest.mark.parametrize("key", NO_TYPOS)
async def test_other_unknown_fields_stay_ignored(key: str) -> None:
    for value in ("calm", 1.5, True, ["a"], None):
        assert (await post("/v1/completions", json.dumps({key: value}).encode())).status_code == 200


async def test_two_typos_need_a_value_that_can_be_steering() -> None:
    for value in (SPEC, TEXT):
        assert (await post("/v1/completions", json.dumps({"streeing": value}).encode())).status_code == 400
    assert (await post("/v1/completions", b'{"streeing": 3}')).status_code == 200


async def test_a_null_under_another_name_asks_for_nothing() -> None:
    assert (await post("/v1/completions", b'{"steer": null, "sterring": null}')).status_code == 200


async def test_a_typo_among_the_extra_arguments_is_refused_too() -> None:
    body = json.dumps({"vllm_xargs": {"sterring": TEXT}}).encode()
    assert (await post("/v1/completions", body)).status_code == 400


async def test_a_typo_inside_a_schema_or_a_message_is_the_client_s_own() -> None:
    body = {"tools": [{"function": {"parameters": {"properties": {"steer": {"type": "number"}, "sterring": {}}}}}],
            "messages": [{"role": "user", "content": '{"sterring": {}}'}], "prompt": '"sterring": {}'}  # fmt: skip
    assert (await post("/v1/completions", json.dumps(body).encode())).status_code == 200


def test_no_field_of_the_known_clients_is_taken_for_a_typo() -> None:
    """tests/servers/test_typos.py goes through every field of vLLM's own schema."""
    from openai.types import completion_create_params as completions
    from openai.types.chat import completion_create_params as chat
    from openai.types.responses import response_create_params as responses

    names = {
        *chat.CompletionCreateParamsBase.__annotations__,
        *completions.CompletionCreateParamsBase.__annotations__,
        *responses.ResponseCreateParamsBase.__annotations__,
    }
    assert len(names) > 50
    for name in names:
        assert search_fields({name: {"edits": []}}) is None, name


def test_a_body_of_many_keys_close_to_the_field_is_searched_quickly() -> None:
    letters = "steringa"
    keys = ["".join(letters[(number >> 3 * place) & 7] for place in range(6)) + "nx" for number in range(2**18)]
    content = ("{" + ",".join(f'"{key}":{{}}' for key in keys) + "}").encode()
    began = time.process_time()
    json.loads(content)
    parsing = time.process_time() - began
    began = time.process_time()
    assert search_body(content) is None
    assert time.process_time() - began < 6 * parsing + 0.5
