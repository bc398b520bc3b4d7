"""A bank of two vectors behind HTTP: many requests with a vector each wait for rows, or get 503."""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helpers.server_process import Server, steer_engine_serve

from steer_engine.vectors import ControlVector
from steer_engine.vectors.safetensors_format import to_bytes

pytestmark = pytest.mark.slow

NUM_BLOCKS, HIDDEN_SIZE, NUM_REQUESTS, QUEUE = 3, 64, 64, 100


ROOM = 80
"""Vectors that the store takes: all that the first test sends, and some."""


@pytest.fixture(scope="module")
def narrow(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("narrow")
    (folder / "vectors").mkdir()
    command = steer_engine_serve(
        tiny_llama, "--served-model-name", "tiny", "--steering-vectors", str(folder / "vectors"),
        "--max-num-seqs", "64", "--steering-bank-rows", str(2 * NUM_BLOCKS),
        "--steering-limit", f"max_bank_queue={QUEUE}",
    )  # fmt: skip
    running = Server(command, folder / "server.log", env={"STEER_ENGINE_STORE_BYTES": str(ROOM * len(file_of(0)))})
    yield running
    running.kill()


def file_of(axis: int, size: float = 40.0) -> bytes:
    direction = np.zeros(HIDDEN_SIZE, np.float32)
    direction[axis] = size
    return to_bytes(ControlVector(directions=dict.fromkeys(range(NUM_BLOCKS), direction)))


def inline(axis: int, size: float = 40.0) -> dict[str, Any]:
    return {"edits": [{"vector": {"data": base64.b64encode(file_of(axis, size)).decode()}}]}


async def ask(client: httpx.AsyncClient, number: int, max_tokens: int = 40) -> httpx.Response:
    body = {"model": "tiny", "prompt": f"request {number % HIDDEN_SIZE}", "max_tokens": max_tokens, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True, "steering": inline(number % HIDDEN_SIZE)}
    return await client.post("/v1/completions", json=body)


def client_of(server: Server) -> httpx.AsyncClient:
    # uvicorn closes a connection that is idle for 5 s, which is httpx's default too: let the client be first.
    limits = httpx.Limits(max_connections=400, keepalive_expiry=2)
    return httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits)


def tokens(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


def seconds(server: Server) -> tuple[float, float]:
    """That all requests have waited to be begun, and have run."""
    waited, ran = (server.metric(f"vllm:request_{kind}_time_seconds_sum") for kind in ("queue", "inference"))
    return waited, ran


async def test_many_inline_vectors_at_once(narrow: Server) -> None:
    limits = narrow.get("/v1/steering").json()["limits"]
    assert (limits["bank_rows"], limits["store_bytes"]) == (2 * NUM_BLOCKS, ROOM * len(file_of(0)))
    async with client_of(narrow) as client:
        alone = [tokens(await ask(client, number)) for number in range(NUM_REQUESTS)]
        assert len({tuple(each) for each in alone}) > NUM_REQUESTS // 2
        before = seconds(narrow)
        asking = [asyncio.create_task(ask(client, number)) for number in range(NUM_REQUESTS)]
        while not all(task.done() for task in asking):
            engine = (await client.get("/v1/steering/stats")).json()["engine"]
            assert engine["workers"][0]["bank_rows_pinned"] <= engine["workers"][0]["bank_rows"] == 2 * NUM_BLOCKS
            assert engine["workers"][0]["store_bytes"] <= limits["store_bytes"]
            assert len(engine["vectors"]) <= ROOM
        together = [await task for task in asking]
    assert [tokens(answer) for answer in together] == alone
    assert all("X-Steering" in answer.headers for answer in together)
    waited, ran = (now - then for now, then in zip(seconds(narrow), before, strict=True))
    assert waited > 4 * ran, "the bank has room for two at a time: on average one waits for fifteen others"


async def test_a_queue_that_is_too_long_is_a_503(narrow: Server) -> None:
    async with client_of(narrow) as client:
        answers = await asyncio.gather(*(ask(client, number, max_tokens=60) for number in range(2 * QUEUE)))
        statuses = Counter(answer.status_code for answer in answers)
        assert set(statuses) == {200, 503}
        assert statuses[503] >= QUEUE // 2
        refused = [answer for answer in answers if answer.status_code == 503]
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
        assert all("X-Steering" not in answer.headers for answer in refused)
        assert (await ask(client, 1)).status_code == 200


def test_a_request_that_can_never_fit_is_a_400(narrow: Server, tmp_path: Path) -> None:
    edits = [inline(axis)["edits"][0] | {"scope": {"start": axis}} for axis in range(3)]
    answer = narrow.post("/v1/completions", {"model": "tiny", "prompt": "a", "steering": {"edits": edits}})
    assert answer.status_code == 400
    assert "--steering-bank-rows" in answer.json()["error"]["message"]


def test_a_full_store_is_a_503_and_passes_no_budget(narrow: Server) -> None:
    """Last: a vector stays for a minute after it was sent, so that more of them find no room."""
    budget = narrow.get("/v1/steering").json()["limits"]["store_bytes"]
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1, "temperature": 0}
    answers = []
    for axis in range(2 * ROOM):
        answers.append(narrow.post("/v1/completions", body | {"steering": inline(axis % HIDDEN_SIZE, 10.0 + axis)}))
        if axis % 10 == 0:
            engine = narrow.get("/v1/steering/stats").json()["engine"]
            assert engine["workers"][0]["store_bytes"] <= budget
            assert len(engine["vectors"]) <= ROOM
    statuses = Counter(answer.status_code for answer in answers)
    assert set(statuses) == {200, 503}
    for answer in answers:
        assert ("X-Steering" in answer.headers) is (answer.status_code == 200)
        if answer.status_code == 503:
            assert int(answer.headers["Retry-After"]) >= 1
    assert narrow.post("/v1/completions", body).status_code == 200
