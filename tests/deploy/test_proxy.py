"""deploy/proxy/nginx.conf in a real nginx, in front of small servers: open routes pass, all others are closed."""

from __future__ import annotations

import asyncio
import importlib.util
import re
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from helpers.echo_server import echo
from helpers.proxy_process import CONFIG, MISSING, NO_RATE, WHY_MISSING, Proxy, make_certificates, wait_for_port
from helpers.server_process import free_port

from steer_engine.api.middleware import CARRYING_PATHS, INVOCATIONS
from steer_engine.api.routing import HEADER

pytestmark = pytest.mark.skipif(MISSING, reason=WHY_MISSING)


LONG_ANSWER_SECONDS = 17.0
"""An earlier proxy retried only within 15 s of a request's arrival."""


class Echo:
    """An ASGI app on its own port, in a thread."""

    def __init__(self, name: str, **kwargs: Any) -> None:
        self.port = free_port()
        config = uvicorn.Config(echo(name, **kwargs), port=self.port, log_level="error", lifespan="off")
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=lambda: asyncio.run(self._server.serve()))
        self._thread.start()
        wait_for_port(self.port)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(10)


class Mute:
    """A silent port: it accepts connections until `hang_up`, or accepts none."""

    def __init__(self, *, answers_to_connections: bool) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=64 if answers_to_connections else 0)
        self.port = self._listener.getsockname()[1]
        # A full queue drops new connections, as a lost machine does.
        num_pending = 0 if answers_to_connections else 4
        self._pending = [self._connect() for _ in range(num_pending)]

    def _connect(self) -> socket.socket:
        connection = socket.socket()
        connection.setblocking(False)
        connection.connect_ex(("127.0.0.1", self.port))
        return connection

    def hang_up(self) -> None:
        """Reset all connections, as a killed process does."""
        self._listener.settimeout(0)
        try:
            while True:
                self._listener.accept()[0].close()  # unread data: a reset
        except BlockingIOError:
            self._listener.close()

    def __enter__(self) -> Mute:
        return self

    def __exit__(self, *_: object) -> None:
        for each in (*self._pending, self._listener):
            each.close()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_certificates(tmp_path_factory.mktemp("tls"))


@pytest.fixture(scope="module")
def engine() -> Iterator[Echo]:
    running = Echo("one")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def proxy(tmp_path_factory: pytest.TempPathFactory, engine: Echo, certificates: Path) -> Iterator[Proxy]:
    running = Proxy(tmp_path_factory.mktemp("proxy"), [engine.port], certificates, NO_RATE)
    yield running
    running.stop()


TOKENS = "/inference/v1/generate"
"""For programs on the same machine, which need no proxy."""

OPEN = [
    *(("POST", path) for path in sorted(CARRYING_PATHS - {INVOCATIONS, TOKENS})),
    ("GET", "/v1/models"),
    ("GET", "/v1/steering"),
    ("POST", "/v1/steering/validate"),
    ("GET", "/v1/steering/vectors"),
    ("GET", "/v1/steering/vectors/cheerful"),
    ("GET", "/v1/steering/vectors/sha256:" + 64 * "a"),
    ("PUT", "/v1/steering/vectors/cheerful"),
    ("DELETE", "/v1/steering/vectors/cheerful"),
    ("PUT", "/v1/steering/presets/calm"),
    ("GET", "/readyz"),
]
CLOSED = [
    ("GET", "/metrics"), ("GET", "/metrics/"), ("POST", "/tokenize"), ("POST", "/detokenize"), ("POST", "/invocations"),
    ("GET", "/openapi.json"), ("GET", "/docs"), ("GET", "/redoc"), ("GET", "/version"), ("GET", "/health"),
    ("GET", "/ping"), ("POST", "/v1/load_lora_adapter"), ("POST", "/reset_prefix_cache"), ("POST", "/sleep"),
    ("POST", "/collective_rpc"), ("POST", TOKENS), ("POST", "/v1/embeddings"), ("GET", "/"),
    ("GET", "/v1/steering/stats"), ("GET", "/playground"), ("GET", "/server_info"), ("POST", "/v1/chat/completions/x"),
    ("GET", "/v1/steering/vectors/a/b"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "path"), OPEN, ids=lambda value: value)
def test_open_routes_pass(proxy: Proxy, method: str, path: str) -> None:
    answer = proxy.client.request(method, path, content=b"x" if method in ("POST", "PUT") else None)
    assert answer.status_code == 200, answer.text
    assert answer.json()["method"] == method
    assert answer.json()["raw_path"] == path
    assert answer.headers["x-steering"] == "sha256:of-the-echo"


@pytest.mark.parametrize(("method", "path"), CLOSED, ids=lambda value: value)
def test_all_other_routes_are_closed(proxy: Proxy, method: str, path: str) -> None:
    answer = proxy.client.request(method, path)
    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == 404
    assert "x-steering" not in answer.headers


@pytest.mark.parametrize(("method", "path"), [("GET", "/v1/chat/completions"), ("DELETE", "/v1/models"),
                                              ("PUT", "/v1/steering"), ("GET", "/v1/steering/validate")])  # fmt: skip
def test_only_the_methods_of_a_route(proxy: Proxy, method: str, path: str) -> None:
    assert proxy.client.request(method, path).status_code == 403


@pytest.mark.parametrize(
    "target",
    ["/v1/models/../../metrics", "/v1/steering/vectors/../../../metrics", "/v1/steering/vectors/..%2f..%2f..%2fmetrics",
     "//metrics", "/./metrics", "/%6detrics", "/v1/../metrics", "/METRICS", "/metrics;/v1/models", "/metrics%00"],
)  # fmt: skip
def test_closed_routes_stay_closed_in_every_spelling(proxy: Proxy, target: str) -> None:
    assert proxy.raw(target) in (400, 404)


@pytest.mark.parametrize(
    "target", ["/metrics/../v1/models", "/metrics/%2e%2e/v1/models", "/v1/%6dodels", "//v1/models"]
)
def test_the_server_sees_the_path_that_was_checked(proxy: Proxy, target: str) -> None:
    """vLLM mounts /metrics with all that is below it: the text of a request must not pass."""
    assert proxy.raw(target) == 200
    assert b'"raw_path": "/v1/models"' in proxy.last


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/v1/steering/vectors/cheerful"])
def test_a_browser_can_ask_whether_another_origin_may_send_a_request(proxy: Proxy, path: str) -> None:
    answer = proxy.client.options(path, headers={"Origin": "https://lab.example"})
    assert answer.status_code == 200
    assert answer.json()["method"] == "OPTIONS"
    assert answer.json()["headers"]["origin"] == "https://lab.example"


@pytest.mark.parametrize(
    ("address", "admitted"),
    [("127.0.0.1", True), ("10.1.2.3", True), ("172.17.0.1", True), ("172.31.255.1", True), ("192.168.0.1", True),
     ("172.32.0.1", False), ("192.167.0.1", False), ("203.0.113.9", False)],
)  # fmt: skip
def test_changes_come_from_private_networks_and_docker(
    tmp_path: Path, engine: Echo, certificates: Path, address: str, admitted: bool
) -> None:
    """The tests' own address is replaced by that of a header."""
    pretend = "server_tokens off; set_real_ip_from 127.0.0.1; real_ip_header X-Address;"
    proxy = Proxy(tmp_path, [engine.port], certificates, NO_RATE | {"server_tokens off;": pretend})
    try:
        headers = {"X-Address": address}
        changed = proxy.client.put("/v1/steering/vectors/cheerful", content=b"x", headers=headers)
        assert changed.status_code == (200 if admitted else 403)
        assert proxy.client.get("/readyz", headers=headers).status_code == (200 if admitted else 403)
        assert proxy.client.get("/v1/steering/vectors/cheerful", headers=headers).status_code == 200
    finally:
        proxy.stop()


def test_queries_and_keys_pass_and_the_keys_are_not_logged(proxy: Proxy) -> None:
    headers = {"Authorization": "Bearer a-secret-of-a-test", HEADER: "another-secret-of-a-test"}
    answer = proxy.client.get("/v1/steering/vectors/cheerful?download", headers=headers).json()
    assert answer["query"] == "download"
    assert answer["headers"]["authorization"] == headers["Authorization"]
    assert answer["headers"][HEADER] == headers[HEADER]
    assert answer["headers"]["x-forwarded-for"] == "127.0.0.1"
    assert re.fullmatch(r"[0-9a-f]{32}", answer["headers"]["x-request-id"])
    log = proxy.log.read_text()
    assert "GET /v1/steering/vectors/cheerful" in log
    assert "secret-of-a-test" not in log


def test_bodies_are_limited_by_route(proxy: Proxy) -> None:
    small, large = b"x" * 7 * 2**20, b"x" * 9 * 2**20
    assert proxy.client.post("/v1/completions", content=small).json()["num_bytes"] == len(small)
    refused = proxy.client.post("/v1/completions", content=large)
    assert refused.status_code == 413
    assert refused.json()["error"]["param"] == "body"
    assert proxy.client.put("/v1/steering/vectors/v", content=large).json()["num_bytes"] == len(large)


def test_streams_are_not_buffered(proxy: Proxy) -> None:
    arrived = []
    with proxy.client.stream("POST", "/v1/chat/completions", json={"stream": True}) as answer:
        for line in answer.iter_lines():
            if line:
                arrived.append((line, time.monotonic()))
    assert [line for line, _ in arrived] == ["data: 0", "data: 1", "data: 2", "data: [DONE]"]
    assert arrived[-1][1] - arrived[0][1] > 0.6


def test_plain_http_is_not_served(proxy: Proxy) -> None:
    assert httpx.get(f"http://localhost:{proxy.port}/v1/models", timeout=10).status_code == 400
    assert "max-age" in proxy.client.get("/v1/models").headers["strict-transport-security"]


def test_rate_is_limited_by_key(tmp_path: Path, engine: Echo, certificates: Path) -> None:
    proxy = Proxy(tmp_path, [engine.port], certificates, {"rate=20r/s": "rate=1r/m", "burst=40": "burst=4"})
    try:

        def statuses(key: str, count: int) -> list[int]:
            headers = {"Authorization": f"Bearer {key}"}
            return [proxy.client.get("/v1/models", headers=headers).status_code for _ in range(count)]

        assert statuses("one", 8) == [200] * 5 + [429] * 3
        assert statuses("two", 2) == [200] * 2
        refused = proxy.client.get("/v1/models", headers={"Authorization": "Bearer one"})
        assert refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["type"] == "RateLimitError"
    finally:
        proxy.stop()


def test_invented_keys_share_the_rate_of_their_address(tmp_path: Path, engine: Echo, certificates: Path) -> None:
    proxy = Proxy(tmp_path, [engine.port], certificates, {"rate=100r/s": "rate=1r/m", "burst=200": "burst=4"})
    try:
        keys = [{"Authorization": f"Bearer made-up-{number}"} for number in range(8)]
        assert [proxy.client.get("/v1/models", headers=key).status_code for key in keys] == [200] * 5 + [429] * 3
    finally:
        proxy.stop()


def test_a_draining_or_lost_replica_loses_no_request(tmp_path: Path, engine: Echo, certificates: Path) -> None:
    draining = Echo("draining", status=503)
    gone = free_port()
    proxy = Proxy(tmp_path, [draining.port, gone, engine.port], certificates, NO_RATE)
    try:
        for _ in range(12):
            assert proxy.client.post("/v1/completions", content=b"{}").json()["server"] == "one"
    finally:
        proxy.stop()
        draining.stop()


@pytest.mark.slow
def test_a_replica_that_dies_late_in_an_answer_loses_no_request(
    tmp_path: Path, engine: Echo, certificates: Path
) -> None:
    """An answer may take longer than the proxy waits for a connection. The request is retried nevertheless."""
    with Mute(answers_to_connections=True) as dying:
        proxy = Proxy(tmp_path, [dying.port, engine.port], certificates, NO_RATE)
        try:
            with ThreadPoolExecutor(2) as pool:
                # The second request goes to the other replica, since the first has one running.
                answers = [pool.submit(proxy.client.post, "/v1/completions", content=b"{}") for _ in range(2)]
                time.sleep(LONG_ANSWER_SECONDS)
                assert sum(answer.done() for answer in answers) == 1
                dying.hang_up()
                assert [answer.result().json()["server"] for answer in answers] == ["one", "one"]
        finally:
            proxy.stop()


def test_a_silent_machine_loses_no_request(tmp_path: Path, engine: Echo, certificates: Path) -> None:
    """A machine without power refuses no connection, but does not answer."""
    quick = {"proxy_connect_timeout 5s;": "proxy_connect_timeout 1s;"}
    with Mute(answers_to_connections=False) as silent:
        proxy = Proxy(tmp_path, [silent.port, engine.port], certificates, NO_RATE | quick)
        try:
            for _ in range(4):
                assert proxy.client.post("/v1/completions", content=b"{}").json()["server"] == "one"
            assert f"127.0.0.1:{silent.port}" in proxy.log.read_text(), "the silent machine got no request"
        finally:
            proxy.stop()


def test_idle_connections_are_closed_before_the_server_closes_them(proxy: Proxy) -> None:
    """A request on a connection that is being closed would fail, and count as a failure of its server."""
    spec = importlib.util.find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    source = Path(spec.origin).with_name("envs.py").read_text()  # importing it takes seconds
    theirs = re.search(r"VLLM_HTTP_TIMEOUT_KEEP_ALIVE: int = (\d+)", source)
    ours = re.search(r"keepalive_timeout (\d+)s;", CONFIG.read_text())
    assert theirs is not None
    assert ours is not None
    assert int(ours[1]) < int(theirs[1])


def test_no_server_is_a_503(tmp_path: Path, certificates: Path) -> None:
    proxy = Proxy(tmp_path, [free_port()], certificates, NO_RATE)
    try:
        answer = proxy.client.get("/v1/models")
        assert answer.status_code == 503
        assert answer.headers["retry-after"] == "5"
    finally:
        proxy.stop()
