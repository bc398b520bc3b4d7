"""A bank of two vectors behind HTTP: many requests with a vector each wait for rows, or get 503."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helpers.server_process import CAN_PAUSE, STEPS, Server, num_waiting, paused, steer_engine_serve

from steer_engine.api.gates import REFRESH_SECONDS
from steer_engine.vectors import ControlVector
from steer_engine.vectors.safetensors_format import to_bytes

pytestmark = pytest.mark.slow

NUM_BLOCKS, HIDDEN_SIZE, NUM_REQUESTS, NUM_TOKENS, QUEUE = 3, 64, 64, 40, 100


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
    env = CAN_PAUSE | {"STEER_ENGINE_STORE_BYTES": str(ROOM * len(file_of(0)))}
    running = Server(command, folder / "server.log", env=env)
    yield running
    running.kill()


def file_of(axis: int, size: float = 40.0) -> bytes:
    direction = np.zeros(HIDDEN_SIZE, np.float32)
    direction[axis] = size
    return to_bytes(ControlVector(directions=dict.fromkeys(range(NUM_BLOCKS), direction)))


def inline(axis: int, size: float = 40.0) -> dict[str, Any]:
    return {"edits": [{"vector": {"data": base64.b64encode(file_of(axis, size)).decode()}}]}


async def ask(client: httpx.AsyncClient, number: int) -> httpx.Response:
    body = {"model": "tiny", "prompt": f"request {number % HIDDEN_SIZE}", "max_tokens": NUM_TOKENS, "temperature": 0}
    body |= {"ignore_eos": True, "return_token_ids": True, "steering": inline(number % HIDDEN_SIZE)}
    return await client.post("/v1/completions", json=body)


def client_of(server: Server) -> httpx.AsyncClient:
    # uvicorn closes a connection that is idle for 5 s, which is httpx's default too: let the client be first.
    limits = httpx.Limits(max_connections=400, keepalive_expiry=2)
    return httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits)


def tokens(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


async def all_wait(server: Server, number: int) -> None:
    """Until this many requests wait in the engine."""
    deadline = time.monotonic() + 60
    while (waiting := num_waiting(server)) != number:
        assert time.monotonic() < deadline, f"{waiting} requests wait"
        await asyncio.sleep(0.05)


async def test_many_inline_vectors_at_once(narrow: Server) -> None:
    limits = narrow.get("/v1/steering").json()["limits"]
    assert (limits["bank_rows"], limits["store_bytes"]) == (2 * NUM_BLOCKS, ROOM * len(file_of(0)))
    async with client_of(narrow) as client:
        alone = [tokens(await ask(client, number)) for number in range(NUM_REQUESTS)]
        assert len({tuple(each) for each in alone}) > NUM_REQUESTS // 2
        before = narrow.metric(STEPS)
        with paused(narrow):
            asking = [asyncio.create_task(ask(client, number)) for number in range(NUM_REQUESTS)]
            await all_wait(narrow, NUM_REQUESTS)
        while not all(task.done() for task in asking):
            engine = (await client.get("/v1/steering/stats")).json()["engine"]
            assert engine["workers"][0]["bank_rows_pinned"] <= engine["workers"][0]["bank_rows"] == 2 * NUM_BLOCKS
            assert engine["workers"][0]["store_bytes"] <= limits["store_bytes"]
            assert len(engine["vectors"]) <= ROOM
        together = [await task for task in asking]
    assert [tokens(answer) for answer in together] == alone
    assert all("X-Steering" in answer.headers for answer in together)
    # The bank has room for two at a time; each gets a token in a step.
    expected = NUM_REQUESTS * NUM_TOKENS / 2
    assert expected <= narrow.metric(STEPS) - before <= 1.1 * expected


async def test_a_queue_that_is_too_long_is_a_503(narrow: Server) -> None:
    async with client_of(narrow) as client:
        with paused(narrow):
            asking = [asyncio.create_task(ask(client, number)) for number in range(QUEUE)]
            await all_wait(narrow, QUEUE)
            await asyncio.sleep(REFRESH_SECONDS)  # an older number may not have all of them
            refused = await asyncio.gather(*(ask(client, number) for number in range(QUEUE)))
        assert [answer.status_code for answer in refused] == [503] * QUEUE
        assert all(int(answer.headers["Retry-After"]) >= 1 for answer in refused)
        assert all("X-Steering" not in answer.headers for answer in refused)
        assert [(await task).status_code for task in asking] == [200] * QUEUE
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
