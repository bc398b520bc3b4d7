"""Presets, chosen by the field or by the model's name, on a real server."""

from __future__ import annotations

import openai
import pytest
from helpers.asking import CARRYING, MODEL, STREAMING, STRONG, TOKENS, Endpoint, events
from helpers.server_process import Server

endpoints = pytest.mark.parametrize("endpoint", CARRYING.values(), ids=lambda each: each.path)


@endpoints
def test_a_preset_is_the_same_steering_under_a_name(server: Server, endpoint: Endpoint) -> None:
    spelled = endpoint.ask(server, steering=STRONG)
    by_field = endpoint.ask(server, steering={"preset": "loud"})
    by_model = endpoint.ask(server, model=f"{MODEL}:loud")
    for answer in (by_field, by_model):
        assert answer.status_code == 200, answer.text
        assert answer.headers["X-Steering"] == spelled.headers["X-Steering"]
        assert answer.headers["X-Steering-Preset"] == "loud"
        assert endpoint.text(answer.json()) == endpoint.text(spelled.json())
        if endpoint.path != "/v1/messages":
            assert answer.json()["steering"]["preset"] == "loud"
    assert "X-Steering-Preset" not in spelled.headers
    assert by_field.json()["model"] == MODEL
    assert by_model.json()["model"] == f"{MODEL}:loud"


@pytest.mark.parametrize(
    "endpoint",
    [*(each for each in STREAMING if each is not TOKENS), CARRYING["/v1/messages"]],
    ids=lambda each: each.path,
)
def test_every_chunk_names_the_model_that_was_asked(server: Server, endpoint: Endpoint) -> None:
    """Also where a class writes the stream in its own way, as vLLM 0.33 does for `/v1/messages`."""
    answer = endpoint.ask(server, model=f"{MODEL}:loud", stream=True)
    assert answer.headers["X-Steering-Preset"] == "loud"
    chunks = [event.get("response") or event.get("message") or event for event in events(answer)]
    names = {chunk["model"] for chunk in chunks if "model" in chunk}
    assert names == {f"{MODEL}:loud"}


@endpoints
def test_mistakes(server: Server, endpoint: Endpoint) -> None:
    unknown = endpoint.ask(server, model=f"{MODEL}:nobody")
    assert unknown.status_code == 404
    for value in (STRONG, False, {"preset": "loud"}):
        twice = endpoint.ask(server, model=f"{MODEL}:loud", steering=value)
        assert (twice.status_code, twice.json()["error"]["param"]) == (400, "steering")
    misfit = endpoint.ask(server, steering={"preset": "misfit"})
    assert (misfit.status_code, misfit.json()["error"]["param"]) == (400, "steering.preset")
    assert unknown.json()["error"]["param"] == "model"
    assert "hidden size" in misfit.json()["error"]["message"]
    if endpoint.path == "/v1/messages":
        assert {unknown.json()["type"], twice.json()["type"], misfit.json()["type"]} == {"error"}


@endpoints
def test_a_misspelt_preset_as_model_lists_the_presets_the_closest_first(server: Server, endpoint: Endpoint) -> None:
    unknown = endpoint.ask(server, model=f"{MODEL}:lound")
    assert unknown.status_code == 404
    message = unknown.json()["error"]["message"]
    assert f"The model '{MODEL}:lound' does not exist" in message
    assert "there are: loud, misfit" in message
    assert "misfit, loud" in endpoint.ask(server, model=f"{MODEL}:misfits").text
    long = endpoint.ask(server, model=f"{MODEL}:{'x' * 100_000}")
    assert long.status_code == 404
    assert len(long.text) < 800


def test_presets_are_listed_as_models(server: Server) -> None:
    cards = {card["id"]: card for card in server.get("/v1/models").json()["data"]}
    assert set(cards) == {MODEL, f"{MODEL}:loud", f"{MODEL}:misfit"}
    assert cards[f"{MODEL}:loud"]["parent"] == MODEL
    assert cards[f"{MODEL}:loud"]["max_model_len"] == cards[MODEL]["max_model_len"]


def test_a_stock_client_steers_by_the_model_s_name(server: Server) -> None:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        names = [model.id for model in client.models.list()]
        asked = {"messages": [{"role": "user", "content": "Hello!"}], "temperature": 0, "max_tokens": 6}
        plain, steered = (
            client.chat.completions.create(model=name, **asked) for name in (names[0], f"{names[0]}:loud")
        )
    assert steered.model == f"{MODEL}:loud"
    assert steered.choices[0].message.content != plain.choices[0].message.content


def test_an_endpoint_that_cannot_carry_steering_refuses_a_preset_as_model(server: Server) -> None:
    rendered = server.post("/v1/completions/render", {"prompt": "x", "model": f"{MODEL}:loud"})
    assert rendered.status_code == 400, rendered.text
    assert rendered.json()["error"]["param"] == "steering"


def test_a_preset_as_model_tokenizes_like_its_base(server: Server) -> None:
    tokens = [server.post("/tokenize", {"prompt": "a b", "model": name}).json() for name in (MODEL, f"{MODEL}:loud")]
    assert tokens[0]["tokens"]
    assert tokens[0] == tokens[1]
    texts = [
        server.post("/detokenize", {"tokens": tokens[0]["tokens"], "model": name}) for name in (MODEL, f"{MODEL}:loud")
    ]
    assert [text.status_code for text in texts] == [200, 200]
    assert texts[0].json() == texts[1].json()
    for path in ("/tokenize", "/detokenize"):
        unknown = server.post(path, {"prompt": "x", "tokens": [1], "model": f"{MODEL}:nobody"})
        assert unknown.status_code == 404, path
