"""Two data-parallel engines behind two API processes: a vector reaches both before its first request, idle or busy.

Slow: it starts three processes with an engine or a server each.
"""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from deploy.test_replicas import ADMIN, START_SECONDS, along, body, delete, digest, put, tokens
from helpers.server_process import Server, steer_engine_serve

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

ENGINES = 2


@pytest.fixture(scope="module")
def server(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("data_parallel")
    (folder / "vectors").mkdir()
    command = steer_engine_serve(
        tiny_llama, "--served-model-name", "tiny", "--steering-vectors", str(folder / "vectors"),
        "--data-parallel-size", str(ENGINES),
    )  # fmt: skip
    env = {"STEER_ENGINE_ADMIN_KEYS": ADMIN["X-Steering-Admin-Key"], "OMP_WAIT_POLICY": "passive"}
    running = Server(command, folder / "server.log", env=env, wait=False)
    running.wait_for(seconds=START_SECONDS)
    yield running
    running.kill()


def answered(server: Server) -> dict[str, float]:
    """Finished requests by engine."""
    found: dict[str, float] = {}
    lines = re.findall(
        r'^vllm:request_success_total\{engine="(\d)".*\} (\S+)$', server.get("/metrics").text, re.MULTILINE
    )
    for engine, count in lines:
        found[engine] = found.get(engine, 0) + float(count)
    return found


def together(server: Server, count: int, vector: str | None, **fields: Any) -> list[httpx.Response]:
    with ThreadPoolExecutor(8) as pool:
        return list(pool.map(lambda _: server.post("/v1/completions", body(vector, **fields)), range(count)))


def test_both_engines_steer_equally(server: Server) -> None:
    before = answered(server)
    put(server, "north", along(7))
    steered = [tokens(answer) for answer in together(server, 24, "north")]
    plain = [tokens(answer) for answer in together(server, 24, None)]
    assert len({tuple(each) for each in steered}) == len({tuple(each) for each in plain}) == 1
    assert steered[0] != plain[0]
    grown = {engine: count - before.get(engine, 0) for engine, count in answered(server).items()}
    assert len(grown) == ENGINES
    assert all(count >= 4 for count in grown.values()), grown


def test_every_engine_is_armed_and_has_the_vector(server: Server) -> None:
    workers = server.get("/v1/steering/stats").json()["engine"]["workers"]
    assert [worker["engine"] for worker in workers] == list(range(ENGINES))
    for worker in workers:
        assert worker["armed_blocks"] == [0, 1, 2]
        assert along(7).digest in worker["vectors"]


def test_vectors_arrive_while_both_engines_are_busy(server: Server) -> None:
    stop, faults = threading.Event(), []

    def ask() -> None:
        while not stop.is_set():
            answer = server.post("/v1/completions", body("north", max_tokens=64))
            if answer.status_code != 200 or digest(answer) != along(7).digest:
                faults.append(answer.text)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        expected: dict[str, set[tuple[int, ...]]] = {}
        for axis in range(20, 28):
            put(server, "moving", along(axis), **({"If-Match": "*"} if axis > 20 else {}))
            answers = together(server, 8, "moving")
            assert {digest(answer) for answer in answers} == {along(axis).digest}
            expected[along(axis).digest] = {tuple(tokens(answer)) for answer in answers}
            assert len(expected[along(axis).digest]) == 1
        assert len(set(itertools.chain(*expected.values()))) >= 4
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert faults == []
    assert delete(server, "moving").status_code == 200
    assert {answer.status_code for answer in together(server, 8, "moving")} == {404}
