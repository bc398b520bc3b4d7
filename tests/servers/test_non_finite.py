"""What a client sees of a request whose numbers are not finite: an error by each endpoint, and others see nothing."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from helpers.asking import events
from helpers.living import along
from helpers.resolving_server import requests
from helpers.server_process import SMALL, Server

from steer_engine.vectors.safetensors_format import to_bytes

pytestmark = pytest.mark.slow

BROKEN = {
    "edits": [{"vector": "house", "op": "set", "target": 3e38}, {"vector": "house", "op": "add_relative", "scale": 9.0}]
}
KINDS = {
    kind: (path, {**body, "steering": BROKEN})
    for kind, (path, body) in requests({}).items()
    if kind in ("named", "list of prompts", "n=2", "chat", "chat batch", "responses", "messages", "tokens")
}
STREAMED = ("named", "chat", "tokens")
GAUGE = "steer_engine_ended_non_finite"
SECONDS = 30
"""The gauge is refreshed every ten seconds."""


@pytest.fixture(scope="module")
def unchecked(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("unchecked")
    vectors = folder / "vectors"
    vectors.mkdir()
    (vectors / "house.safetensors").write_bytes(to_bytes(along(5)))
    script = Path(__file__).parents[1] / "helpers" / "unchecked_server.py"
    command = [sys.executable, "-P", str(script), "serve", tiny_llama, "--served-model-name", "tiny", *SMALL]
    running = Server([*command, "--steering-vectors", str(vectors), "--enable-scale-out"], folder / "server.log")
    yield running
    running.kill()


def plain(server: Server) -> Any:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 4, "temperature": 0, "ignore_eos": True, "logprobs": 1}
    answer = server.post("/v1/completions", body)
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    return choice["text"], choice["logprobs"]["token_logprobs"]


@pytest.mark.parametrize("kind", KINDS)
def test_each_endpoint_answers_with_an_error(unchecked: Server, kind: str) -> None:
    before = plain(unchecked)
    path, body = KINDS[kind]
    answer = unchecked.post(path, body)
    assert answer.status_code == 500, answer.text
    assert "Internal server error" in answer.text
    assert "x-steering" not in answer.headers
    assert plain(unchecked) == before


@pytest.mark.parametrize("kind", STREAMED)
def test_a_stream_ends_with_an_error_event(unchecked: Server, kind: str) -> None:
    path, body = KINDS[kind]
    answer = unchecked.post(path, {**body, "stream": True})
    assert answer.status_code == 200, answer.text
    found = [event for event in events(answer) if "error" in event]
    assert [event["error"]["code"] for event in found] == [500], answer.text
    assert not [event for event in events(answer) if "choices" in event and event["choices"][0].get("finish_reason")]


def test_the_gauge_and_the_log_tell_the_operator(unchecked: Server) -> None:
    path, body = KINDS["named"]
    before = unchecked.log.count("its numbers are not finite")
    assert unchecked.post(path, body).status_code == 500
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline and unchecked.metric(GAUGE) < before + 1:
        time.sleep(0.5)
    assert unchecked.log.count("its numbers are not finite") == before + 1
    assert unchecked.metric(GAUGE) == before + 1
    assert json.dumps(BROKEN) not in unchecked.log
