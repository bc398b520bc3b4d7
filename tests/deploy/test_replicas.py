"""Replicas on one registry folder, behind our proxy: all serve what is uploaded to one, and neither a rolling restart
nor `kill -9` loses or changes an answer.

Slow: it starts three servers.
"""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from helpers.proxy_process import MISSING, NO_RATE, WHY_MISSING, Proxy, make_certificates
from helpers.server_process import Server, free_port, steer_engine_serve

from steer_engine.vectors import ControlVector
from steer_engine.vectors.safetensors_format import to_bytes

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

ADMIN = {"X-Steering-Admin-Key": "the-admin-key-of-a-test"}
HIDDEN_SIZE = 64
START_SECONDS = 480
"""Twice the limit of one server, since servers load at the same time, or while others answer."""


def along(axis: int) -> ControlVector:
    """A vector along one axis, strong enough that each axis gives another greedy text."""
    direction_D = np.zeros(HIDDEN_SIZE, np.float32)
    direction_D[axis] = 40.0
    return ControlVector(directions={1: direction_D})


class Replicas:
    """Servers of one model and one folder, each with its own log."""

    def __init__(self, model: str, folder: Path) -> None:
        self._model, self._folder = model, folder
        (folder / "vectors").mkdir()

    def start(self, name: str, *, port: int | None = None) -> Server:
        command = steer_engine_serve(
            self._model, "--served-model-name", "tiny", "--steering-vectors", str(self._folder / "vectors"),
            "--shutdown-timeout", "60",
        )  # fmt: skip
        env = {"STEER_ENGINE_ADMIN_KEYS": ADMIN["X-Steering-Admin-Key"], "OMP_WAIT_POLICY": "passive"}
        return Server(command, self._folder / f"{name}.log", env=env, wait=False, port=port)


@pytest.fixture(scope="module")
def replicas(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> Replicas:
    return Replicas(tiny_llama, tmp_path_factory.mktemp("replicas"))


@pytest.fixture(scope="module")
def pair(replicas: Replicas) -> Iterator[tuple[Server, Server]]:
    """Two replicas. They load at the same time."""
    started = [replicas.start("one"), replicas.start("two")]
    try:
        for server in started:
            server.wait_for(seconds=START_SECONDS)
        yield started[0], started[1]
    finally:
        for server in started:
            server.kill()


def body(vector: str | None = None, **fields: Any) -> dict[str, Any]:
    requested = {"model": "tiny", "prompt": "abc", "max_tokens": 4, "temperature": 0, "ignore_eos": True}
    requested |= {"return_token_ids": True, **fields}
    return requested | ({"steering": {"edits": [{"vector": vector}]}} if vector else {})


def ask(server: Server, vector: str | None = None) -> httpx.Response:
    return server.post("/v1/completions", body(vector))


def tokens(answer: httpx.Response) -> list[int]:
    assert answer.status_code == 200, answer.text
    return list(answer.json()["choices"][0]["token_ids"])


def put(server: Server, name: str, vector: ControlVector, **headers: str) -> httpx.Response:
    url = f"{server.url}/v1/steering/vectors/{name}"
    return httpx.put(url, content=to_bytes(vector), headers=ADMIN | headers, timeout=60)


def delete(server: Server, name: str) -> httpx.Response:
    return httpx.delete(f"{server.url}/v1/steering/vectors/{name}", headers=ADMIN, timeout=60)


def digest(answer: httpx.Response) -> str:
    assert answer.status_code == 200, answer.text
    return str(answer.json()["steering"]["edits"][0]["vector"])


def generation(server: Server) -> int:
    return int(server.get("/v1/steering").json()["generation"])


def test_an_upload_to_one_is_served_by_the_other_at_its_next_request(pair: tuple[Server, Server]) -> None:
    one, two = pair
    plain = tokens(ask(two))
    assert ask(two, "new").status_code == 404
    assert put(one, "new", along(7)).status_code == 201
    answers = [ask(server, "new") for server in (two, one)]
    assert {digest(answer) for answer in answers} == {along(7).digest}
    assert tokens(answers[0]) == tokens(answers[1]) != plain
    assert answers[0].headers["X-Steering"] == answers[1].headers["X-Steering"]


def test_replaces_and_deletes_converge(pair: tuple[Server, Server]) -> None:
    one, two = pair
    put(one, "moving", along(9))
    for axis, (writer, reader) in zip(range(10, 20), itertools.cycle([(two, one), (one, two)]), strict=False):
        assert put(writer, "moving", along(axis), **{"If-Match": "*"}).status_code == 200
        assert digest(ask(reader, "moving")) == along(axis).digest
    assert put(one, "moving", along(30), **{"If-Match": along(9).digest}).status_code == 412
    assert delete(two, "moving").status_code == 200
    assert ask(one, "moving").status_code == 404
    assert delete(one, "moving").status_code == 404
    assert generation(one) == generation(two)


def test_of_two_simultaneous_uploads_of_one_name_one_wins_everywhere(pair: tuple[Server, Server]) -> None:
    for race in range(8):
        name, axes = f"race{race}", (32 + race, 48 + race)
        with ThreadPoolExecutor(2) as pool:
            done = list(pool.map(lambda job: put(job[0], name, along(job[1])), zip(pair, axes, strict=True)))  # noqa: B023
        assert sorted(answer.status_code for answer in done) == [201, 409]
        won = along(axes[0] if done[0].status_code == 201 else axes[1]).digest
        assert {digest(ask(server, name)) for server in pair} == {won}


def test_presets_are_shared(pair: tuple[Server, Server]) -> None:
    one, two = pair
    put(one, "calm", along(5))
    url = f"{one.url}/v1/steering/presets/quiet"
    assert httpx.put(url, json={"edits": [{"vector": "calm"}]}, headers=ADMIN, timeout=60).status_code == 201
    by_model = two.post("/v1/completions", body() | {"model": "tiny:quiet"})
    assert by_model.headers["X-Steering-Preset"] == "quiet"
    assert tokens(by_model) == tokens(ask(one, "calm"))


class Load:
    """Clients that send steered and other requests through the proxy until they are stopped. All answers are kept."""

    def __init__(self, proxy: Proxy, num_clients: int = 4) -> None:
        self._proxy, self._stop = proxy, threading.Event()
        self.pause = 0.0
        """Seconds between an answer and the client's next request."""
        self.answers: list[tuple[str | None, httpx.Response | Exception]] = []
        self._threads = [threading.Thread(target=self._ask, args=(number,)) for number in range(num_clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self, number: int) -> None:
        with httpx.Client(base_url=self._proxy.client.base_url, verify=self._proxy.context, timeout=120) as client:
            mix = ("north", None, "south", "north")
            for vector in itertools.cycle(mix[number % 4 :] + mix[: number % 4]):
                if self._stop.is_set():
                    return
                try:
                    answer = client.post("/v1/completions", json=body(vector, max_tokens=16))
                except Exception as error:
                    self.answers.append((vector, error))
                else:
                    self.answers.append((vector, answer))
                time.sleep(self.pause)

    def wait_for(self, more: int) -> None:
        goal, deadline = len(self.answers) + more, time.monotonic() + 120
        while len(self.answers) < goal:
            assert time.monotonic() < deadline, "no more answers"
            time.sleep(0.05)

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()


@pytest.mark.skipif(MISSING, reason=WHY_MISSING)
def test_a_rolling_restart_and_a_crash_lose_nothing(
    pair: tuple[Server, Server], replicas: Replicas, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """The last test, since it ends both replicas: the first is drained and replaced, then the second is killed."""
    one, two = pair
    put(one, "north", along(21))
    put(two, "south", along(22))
    expected = {
        vector: tokens(two.post("/v1/completions", body(vector, max_tokens=16))) for vector in (None, "north", "south")
    }
    digests = {"north": along(21).digest, "south": along(22).digest}
    assert len({tuple(each) for each in expected.values()}) == 3
    certificates = make_certificates(tmp_path_factory.mktemp("tls"))
    three_port = free_port()
    proxy = Proxy(tmp_path, [one.port, two.port, three_port], certificates, NO_RATE)
    load = Load(proxy)
    three = None
    try:
        load.wait_for(30)
        one.process.terminate()
        assert one.process.wait(90) == 0
        load.wait_for(10)
        load.pause = 1.0  # the loading replica needs the same cores
        three = replicas.start("three", port=three_port)
        three.wait_for(seconds=START_SECONDS)
        load.pause = 0.0
        while f":{three_port} sha256" not in proxy.log.read_text():
            load.wait_for(10)  # the proxy retries it some seconds after its last failure
        two.kill()
        load.wait_for(40)
        load.stop()
    finally:
        load.stop()
        proxy.stop()
        if three is not None:
            three.kill()
    lost = [(vector, answer) for vector, answer in load.answers if not isinstance(answer, httpx.Response)]
    assert lost == []
    answers = [(vector, answer) for vector, answer in load.answers if isinstance(answer, httpx.Response)]
    assert [answer.text for _, answer in answers if answer.status_code != 200] == []
    for vector, answer in answers:
        assert tokens(answer) == expected[vector]
        if vector is None:
            assert "X-Steering" not in answer.headers
        else:
            assert digest(answer) == digests[vector]
    assert len(answers) >= 110
