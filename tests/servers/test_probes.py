"""Probes over HTTP: numbers beside the tokens on every endpoint that has a place for them, streamed or not; stop rules.

That each number is right is shown with engines (`tests/engines/test_probes.py`); here, that each reaches its token.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.asking import ANTHROPIC, BATCH, CHAT, COMPLETIONS, MAX_TOKENS, RESPONSES, STRONG, TOKENS, Endpoint, events
from helpers.server_process import Server

PROBE = {"name": "p", "vector": "west", "blocks": [10, 20]}
WATCHED = {"probes": [PROBE, {"name": "q", "vector": "east", "blocks": 12, "measure": "dot", "after": True}]}
LONG = {"temperature": 0, "max_tokens": MAX_TOKENS, "ignore_eos": True}
TEXT = Endpoint(COMPLETIONS.path, COMPLETIONS.body | LONG)
WITH_CHOICES = {
    CHAT.path: Endpoint(CHAT.path, CHAT.body | LONG),
    TEXT.path: TEXT,
    TOKENS.path: Endpoint(TOKENS.path, TOKENS.body | {"sampling_params": LONG}),
}


def asked(server: Server, endpoint: Endpoint, steering: Any, **fields: Any) -> dict[str, Any]:
    answer = endpoint.ask(server, steering=steering, **fields)
    assert answer.status_code == 200, answer.text
    assert "_steer" not in answer.text
    body: dict[str, Any] = answer.json()
    return body


def lengths(told: dict[str, Any]) -> list[int]:
    return [len(numbers) for blocks in told["probes"].values() for numbers in blocks.values()]


@pytest.mark.parametrize("path", WITH_CHOICES)
def test_a_number_per_token_probe_and_block(server: Server, path: str) -> None:
    body = asked(server, WITH_CHOICES[path], WATCHED)
    told = body["choices"][0]["steering"]
    assert {name: list(blocks) for name, blocks in told["probes"].items()} == {"p": ["10", "20"], "q": ["12"]}
    assert lengths(told) == [MAX_TOKENS] * 3
    assert all(abs(number) <= 1 for number in told["probes"]["p"]["10"])
    assert "prompt_probes" not in told
    assert [probe["name"] for probe in body["steering"]["probes"]] == ["p", "q"]
    steered = asked(server, WITH_CHOICES[path], STRONG | WATCHED)["choices"][0]["steering"]["probes"]
    assert abs(steered["q"]["12"][0] - told["probes"]["q"]["12"][0]) > 10  # an edit of 60 along this vector


@pytest.mark.parametrize("path", WITH_CHOICES)
def test_a_stream_brings_the_same_numbers_in_the_chunks_of_their_tokens(server: Server, path: str) -> None:
    endpoint = WITH_CHOICES[path]
    spec = {"probes": [PROBE | {"scope": "all"}, PROBE | {"name": "s", "return": "summary"}]}
    whole = asked(server, endpoint, spec)["choices"][0]["steering"]
    shown = {} if path == TOKENS.path else {"return_token_ids": True}
    answer = endpoint.ask(server, steering=spec, stream=True, **shown)
    parts = [choice for event in events(answer) for choice in event["choices"] if "steering" in choice]
    told = [part["steering"] for part in parts]
    joined = [number for each in told for number in each["probes"].get("p", {}).get("20", [])]
    assert joined == pytest.approx(whole["probes"]["p"]["20"], abs=1e-2)
    # A chunk has several tokens where the consumer was slower than the engine.
    assert [len(each["probes"]["p"]["20"]) for each in told] == [len(part["token_ids"]) for part in parts]
    assert [each for each in told if "prompt_probes" in each] == told[:1]
    assert told[0]["prompt_probes"]["p"]["10"] == pytest.approx(whole["prompt_probes"]["p"]["10"], abs=1e-2)
    assert [each for each in told if "s" in each["probes"]] == told[-1:]
    assert told[-1]["probes"]["s"]["10"]["tokens"] == MAX_TOKENS


def test_every_choice_of_every_prompt_has_its_own(server: Server) -> None:
    prompts = ["One day", "The capital of France is", "A"]
    body = asked(server, TEXT, WATCHED, prompt=prompts, n=2, temperature=1.0, seed=3)
    assert [choice["index"] for choice in body["choices"]] == list(range(6))
    assert [lengths(choice["steering"]) for choice in body["choices"]] == [[MAX_TOKENS] * 3] * 6
    first = [choice["steering"]["probes"]["p"]["10"][0] for choice in body["choices"]]
    assert first[0] == first[1] != first[2] == first[3] != first[4]
    batch = asked(server, BATCH, WATCHED)
    assert [lengths(choice["steering"]) for choice in batch["choices"]] == [[MAX_TOKENS] * 3] * 2


def test_responses_tell_them_beside_the_report(server: Server) -> None:
    body = asked(server, RESPONSES, {"probes": [PROBE]})
    assert [len(numbers) for numbers in body["steering"]["numbers"]["probes"]["p"].values()] == [MAX_TOKENS] * 2
    streamed = events(RESPONSES.ask(server, steering={"probes": [PROBE]}, stream=True))
    assert len(streamed[-1]["response"]["steering"]["numbers"]["probes"]["p"]["10"]) == MAX_TOKENS


def test_messages_have_no_place_for_numbers_and_take_stop_rules(server: Server) -> None:
    refused = ANTHROPIC.ask(server, steering={"probes": [PROBE]})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "steering.probes"), refused.text
    assert "no place for the numbers of probes" in refused.text
    silent = {"probes": [PROBE | {"return": "none"}], "stop": [{"probe": "p", "block": 10, "above": -2.0, "for": 2}]}
    body = asked(server, ANTHROPIC, silent)
    assert body["usage"]["output_tokens"] == 2


@pytest.mark.parametrize("path", WITH_CHOICES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_rule_ends_the_answer_at_its_token(server: Server, path: str, stream: bool) -> None:
    endpoint = WITH_CHOICES[path]
    spec = {"probes": [PROBE], "stop": [{"probe": "p", "block": 20, "above": -2.0, "for": 3}]}
    fields = {"stream_options": {"include_usage": True}, "stream": True} if stream else {}
    answer = endpoint.ask(server, steering=spec, **fields)
    bodies = events(answer) if stream else [answer.json()]
    choices = [choice for body in bodies for choice in body["choices"]]
    assert choices[-1]["finish_reason"] == "stop"
    assert choices[-1]["stop_reason"] == "probe:p"
    assert sum(len(choice["steering"]["probes"]["p"]["20"]) for choice in choices if "steering" in choice) == 3
    usage = [body["usage"] for body in bodies if body.get("usage")]
    if usage:
        assert usage[-1]["completion_tokens"] == 3
    free = endpoint.ask(server).json()
    whole = endpoint.text(free)
    text = "".join(_text(choice) for choice in choices)
    assert whole.startswith(text) if path != TOKENS.path else True
    assert text or path == TOKENS.path


def _text(choice: dict[str, Any]) -> str:
    for holder in (choice, choice.get("delta") or {}, choice.get("message") or {}):
        for key in ("text", "content"):
            if holder.get(key):
                return str(holder[key])
    return ""


@pytest.fixture
def watching(vectors_dir: Path) -> Iterator[str]:
    preset = vectors_dir / "watching.preset.json"
    preset.write_text(json.dumps({"probes": [PROBE]}))
    yield "watching"
    preset.unlink()


def test_messages_leave_out_the_numbers_of_a_preset(server: Server, watching: str, vectors_dir: Path) -> None:
    """Whoever names a preset, or gets the server's default, need not know that it has probes."""
    plain = asked(server, ANTHROPIC, None)
    for fields in ({"steering": {"preset": watching}}, {"model": f"{ANTHROPIC.body['model']}:{watching}"}):
        answer = ANTHROPIC.ask(server, **fields)
        assert answer.status_code == 200, answer.text
        assert answer.json()["content"] == plain["content"]
        assert answer.headers["X-Steering-Preset"] == watching
    mixed = ANTHROPIC.ask(server, steering={"preset": watching, "probes": [PROBE | {"name": "mine"}]})
    assert (mixed.status_code, mixed.json()["error"]["message"][:11]) == (400, "The answers")
    own = PROBE | {"name": "mine", "return": "none"}
    stop = [{"probe": "mine", "block": 10, "above": -2.0, "for": 2}]
    for extra in ({"probes": [own], "stop": stop}, {"stop": [{"probe": "p", "block": 20, "above": -2.0, "for": 2}]}):
        body = asked(server, ANTHROPIC, {"preset": watching} | extra)
        assert body["usage"]["output_tokens"] == 2


def test_a_preset_may_carry_probes_and_a_request_adds_its_own(server: Server, watching: str) -> None:
    told = asked(server, TEXT, {"preset": watching})["choices"][0]["steering"]["probes"]
    assert list(told) == ["p"]
    more = {"preset": watching, "probes": [PROBE | {"name": "mine"}]}
    assert list(asked(server, TEXT, more)["choices"][0]["steering"]["probes"]) == ["p", "mine"]
    twice = TEXT.ask(server, steering={"preset": watching, "probes": [PROBE]})
    assert (twice.status_code, twice.json()["error"]["param"]) == (400, "steering.probes[0].name")


@pytest.mark.parametrize(
    ("steering", "status", "param"),
    [
        ({"probes": [PROBE | {"vector": "nobody"}]}, 404, "steering.probes[0].vector"),
        ({"probes": [PROBE | {"blocks": [3]}]}, 400, "steering.probes[0].blocks"),
        ({"probes": [PROBE] * 2}, 400, "steering.probes[1].name"),
        ({"probes": [PROBE | {"name": f"p{i}"} for i in range(9)]}, 400, "steering.probes"),
        ({"probes": [PROBE], "stop": [{"probe": "x", "above": 0}]}, 400, "steering.stop[0].probe"),
        ({"probes": [PROBE], "stop": [{"probe": "p", "above": "high"}]}, 400, "steering.stop[0].above"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_wrong_probes(server: Server, steering: dict[str, Any], status: int, param: str) -> None:
    answer = CHAT.ask(server, steering=steering)
    assert (answer.status_code, answer.json()["error"]["param"]) == (status, param), answer.text


def test_a_threshold_must_be_finite(server: Server) -> None:
    spec = json.dumps({"probes": [PROBE], "stop": [{"probe": "p", "block": 10, "above": 1}]}).replace(
        '"above": 1', '"above": 1e999'
    )
    answer = CHAT.ask(server, vllm_xargs={"steering": spec})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "steering.stop[0].above"), answer.text
