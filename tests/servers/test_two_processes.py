"""Two API processes on one engine: whichever answers, a name stands for what was acknowledged last."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from helpers.living import ADMIN, INFERENCE, OPERATOR, USER, Follower, along, spec
from helpers.server_process import Server, steer_engine_serve

from steer_engine.vectors.safetensors_format import to_bytes

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def twins(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("twins")
    (folder / "vectors").mkdir()
    (folder / "vectors" / "watched.safetensors").write_bytes(to_bytes(along(3)))
    command = steer_engine_serve(
        tiny_llama, "--served-model-name", "tiny", "--steering-vectors", str(folder / "vectors"),
        "--api-server-count", "2", "--api-key", INFERENCE, "--steering-monitor", "watched:1:dot:above=0",
    )  # fmt: skip
    running = Server(command, folder / "server.log", env={"STEER_ENGINE_ADMIN_KEYS": ADMIN})
    yield running
    running.kill()


def fresh(server: Server, method: str, path: str, **options: Any) -> httpx.Response:
    """On a connection of its own: the system gives it to one process or the other."""
    options.setdefault("headers", USER)
    return httpx.request(method, server.url + path, timeout=60, **options)


def ask(server: Server, steering: Any) -> httpx.Response:
    body = {"model": "tiny", "prompt": "abc", "max_tokens": 3, "temperature": 0, "ignore_eos": True}
    return fresh(server, "POST", "/v1/completions", json=body | {"return_token_ids": True, "steering": steering})


def put(server: Server, name: str, axis: int) -> int:
    headers = OPERATOR | ({"If-Match": "*"} if axis > 20 else {})
    url = f"/v1/steering/vectors/{name}"
    return fresh(server, "PUT", url, content=to_bytes(along(axis)), headers=headers).status_code


def test_both_processes_answer_and_their_metrics_are_on_one_page(twins: Server) -> None:
    """`stats` has the counters of the process that answers; vLLM's page for several reads what all wrote into files."""
    refused = "steer_engine_requests_total{outcome=refused}"

    def on_the_page() -> float:
        page = fresh(twins, "GET", "/metrics").text
        assert re.search(r"^steer_engine_armed 1\.0$", page, re.MULTILINE)
        found = re.search(r'^steer_engine_requests_total\{outcome="refused"\} (\S+)$', page, re.MULTILINE)
        return float(found[1]) if found else 0.0

    before = on_the_page()
    for _ in range(21):  # an odd number: they cannot have the same part of it
        assert ask(twins, spec("nobody")).status_code == 404
    assert on_the_page() == before + 21
    counts = {fresh(twins, "GET", "/v1/steering/stats").json()["api"].get(refused, 0.0) for _ in range(40)}
    assert len(counts) == 2
    assert sum(counts) == before + 21


def test_both_processes_count_what_their_requests_are_measured(twins: Server) -> None:
    def on_the_page() -> tuple[float, float]:
        page = fresh(twins, "GET", "/metrics").text
        names = ("steer_engine_monitor_tokens_total{", 'steer_engine_monitor_dot_bucket{block="1",le="+Inf"')
        return tuple(
            sum(float(line.split()[-1]) for line in page.splitlines() if line.startswith(name)) for name in names
        )

    before = on_the_page()
    assert before[0] == before[1]
    answers = [ask(twins, False) for _ in range(21)]
    assert {answer.status_code for answer in answers} == {200}
    assert on_the_page() == (before[0] + 21 * 3, before[1] + 21 * 3)


def test_a_name_is_never_stale_in_either_process(twins: Server) -> None:
    expected: dict[str, list[int]] = {}
    for axis in range(20, 40):
        assert put(twins, "moving", axis) == (201 if axis == 20 else 200)
        for _ in range(4):
            answer = ask(twins, spec("moving"))
            assert answer.status_code == 200, answer.text
            assert answer.json()["steering"]["edits"][0]["vector"] == along(axis).digest
            tokens = answer.json()["choices"][0]["token_ids"]
            assert expected.setdefault(along(axis).digest, tokens) == tokens
    assert len({tuple(tokens) for tokens in expected.values()}) >= 4
    gone = fresh(twins, "DELETE", "/v1/steering/vectors/moving", headers=OPERATOR)
    assert gone.status_code == 200
    assert [ask(twins, spec("moving")).status_code for _ in range(8)] == [404] * 8


def test_names_move_under_load(twins: Server) -> None:
    """What an answer says that it used is what it used, and a request that begins after a change sees the change."""
    assert put(twins, "busy", 20) == 201
    alone = {along(axis).digest: ask(twins, {"edits": [{"vector": along(axis).digest}]}) for axis in (20,)}
    assert alone[along(20).digest].status_code == 200
    right: dict[str, set[tuple[int, ...]]] = {}
    faults: list[str] = []
    stop = threading.Event()

    def load() -> None:
        while not stop.is_set():
            answer = ask(twins, spec("busy"))
            if answer.status_code != 200:
                faults.append(answer.text)
                continue
            used = answer.json()["steering"]["edits"][0]["vector"]
            right.setdefault(used, set()).add(tuple(answer.json()["choices"][0]["token_ids"]))

    threads = [threading.Thread(target=load) for _ in range(4)]
    for thread in threads:
        thread.start()
    for axis in range(21, 36):
        assert put(twins, "busy", axis) == 200
        assert ask(twins, spec("busy")).json()["steering"]["edits"][0]["vector"] == along(axis).digest
    stop.set()
    for thread in threads:
        thread.join()
    assert faults == []
    assert all(len(texts) == 1 for texts in right.values())
    assert len(right) >= 3


def test_both_let_finish_what_is_under_way(twins: Server) -> None:
    """Last: it ends them. vLLM's own API processes cut their connection to the engine at once."""
    put(twins, "north", 20)
    brief = [Follower(twins, 5, stream=number % 2 == 1, vector="north") for number in range(6)]
    long = [Follower(twins, 400, stream=True, vector="north") for _ in range(4)]
    for follower in (*brief, *long):
        assert follower.begun.wait(60)
    twins.process.terminate()
    for follower in (*brief, *long):
        follower.join()
        follower.assert_sent_away()
    assert twins.process.wait(60) == 0
