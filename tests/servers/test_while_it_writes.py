"""What happens to answers that are being written: by the real model, slowly enough to be met in the middle."""

from __future__ import annotations

import http.client
import json
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helpers.living import ADMIN, OPERATOR, put, spec
from helpers.server_process import Server, steer_engine_serve, wait_until_nothing_is_held

from steer_engine.vectors import ControlVector

pytestmark = pytest.mark.slow

LONG = 400
"""Tokens of an answer: some ten seconds. Who asks for fewer wants to see the end."""


@contextmanager
def serving(model: str, folder: Path, *options: str) -> Iterator[Server]:
    """A server of the real model with two vectors, which a test may end."""
    command = steer_engine_serve(model, "--served-model-name", "real", "--steering-vectors", str(folder), *options)
    running = Server(command, folder / "server.log", env={"STEER_ENGINE_ADMIN_KEYS": ADMIN})
    try:
        direction = np.random.default_rng(1).standard_normal(576).astype(np.float32)
        for name, sign in (("lasting", 1), ("leaving", -1)):
            assert put(running, name, ControlVector(directions={15: sign * direction})).status_code == 201
        yield running
    finally:
        running.kill()


@pytest.fixture(scope="module")
def server(smollm2: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Ended by the last test that has it."""
    with serving(smollm2, tmp_path_factory.mktemp("writing"), "--shutdown-timeout", "1") as running:
        yield running


def completion(vector: str, **fields: Any) -> dict[str, Any]:
    return {
        "model": "real", "prompt": "Once upon a time", "max_tokens": LONG, "temperature": 0, "ignore_eos": True,
        "return_token_ids": True, "steering": spec(vector), **fields,
    }  # fmt: skip


def wait_until_running(server: Server, number: int) -> None:
    deadline = time.monotonic() + 30
    while (now := server.metric("vllm:num_requests_running")) != number:
        assert time.monotonic() < deadline, f"{now:g} requests are running"
        time.sleep(0.02)


def delete(server: Server, vector: str) -> dict[str, Any]:
    answer = httpx.delete(f"{server.url}/v1/steering/vectors/{vector}", headers=OPERATOR, timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def test_who_is_steered_by_a_vector_that_is_deleted_is_so_to_the_end(server: Server) -> None:
    body = completion("leaving", max_tokens=60)
    expected = server.post("/v1/completions", body).json()["choices"][0]["token_ids"]
    assert expected != server.post("/v1/completions", {**body, "steering": False}).json()["choices"][0]["token_ids"]
    with server.client.stream("POST", "/v1/completions", json={**body, "stream": True}) as answer:
        lines = (line.removeprefix("data: ") for line in answer.iter_lines() if line)
        events = [next(lines)]
        deleted = delete(server, "leaving")
        events += lines
    assert deleted["in_flight"] == 1
    assert events.pop() == "[DONE]"
    assert [token for event in events for token in json.loads(event)["choices"][0]["token_ids"]] == expected
    assert server.post("/v1/completions", body).status_code == 404


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_hangs_up_stops_its_answer(server: Server, stream: bool) -> None:
    wait_until_running(server, 0)
    before = server.metric("vllm:generation_tokens_total")
    body = json.dumps(completion("lasting", stream=stream, n=2, temperature=1))
    with closing(http.client.HTTPConnection(server.url.removeprefix("http://"), timeout=60)) as connection:
        connection.request("POST", "/v1/completions", body, {"Content-Type": "application/json"})
        wait_until_running(server, 2)
    wait_until_running(server, 0)
    written = server.metric("vllm:generation_tokens_total") - before
    assert 0 < written < LONG
    wait_until_nothing_is_held(server)
    short = [completion("lasting", max_tokens=8, steering=steering) for steering in (None, False, spec("lasting"))]
    silent, plain, steered = (server.post("/v1/completions", body).json()["choices"][0]["token_ids"] for body in short)
    assert silent == plain != steered


def test_what_is_left_when_the_time_is_up_is_told(server: Server) -> None:
    """The last that has this server: it ends it."""
    answers: dict[str, httpx.Response] = {}
    common = {"model": "real", "ignore_eos": True}
    chat = {**common, "messages": [{"role": "user", "content": "abc"}], "max_tokens": LONG}
    asked: dict[str, tuple[str, dict[str, Any]]] = {
        "stream": ("/v1/completions", completion("lasting", stream=True)),
        "whole": ("/v1/completions", completion("lasting")),
        "chat": ("/v1/chat/completions", chat),
        "responses": ("/v1/responses", {**common, "input": "abc", "max_output_tokens": LONG}),
        "messages": ("/v1/messages", chat),
    }

    def ask(name: str) -> None:
        path, body = asked[name]
        answers[name] = server.client.post(path, json=body, timeout=60)

    asking = [threading.Thread(target=ask, args=(name,)) for name in asked]
    for thread in asking:
        thread.start()
    wait_until_running(server, len(asked))
    began = time.monotonic()
    server.process.terminate()
    for thread in asking:
        thread.join()
    assert time.monotonic() - began < 20
    assert "shutting down" in answers.pop("stream").text
    for answer in answers.values():
        assert answer.status_code == 503, answer.text
        assert "shutting down" in answer.text
        assert int(answer.headers["Retry-After"]) >= 1
    assert server.process.wait(30) == 0


def test_what_is_under_way_when_the_server_is_told_to_stop_comes_whole(smollm2: str, tmp_path: Path) -> None:
    answers: list[httpx.Response] = []
    with serving(smollm2, tmp_path) as server:
        body = completion("lasting", max_tokens=LONG // 2)
        asking = threading.Thread(target=lambda: answers.append(server.client.post("/v1/completions", json=body)))
        asking.start()
        wait_until_running(server, 1)
        server.process.terminate()
        asking.join()
        assert server.process.wait(30) == 0
    (answer,) = answers
    assert answer.status_code == 200, answer.text
    (choice,) = answer.json()["choices"]
    assert (choice["finish_reason"], len(choice["token_ids"])) == ("length", LONG // 2)
