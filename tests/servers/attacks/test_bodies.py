"""Bodies that are cut, too long, said twice or called otherwise. What is not understood is refused, never half done."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from helpers.attack import PRESETS, VECTORS, ask, quiet, raw, refusal, send
from helpers.hostile_bodies import BODIES
from helpers.living import ADMIN, INFERENCE, OPERATOR, USER, along, complete
from helpers.server_process import Server

from steer_engine.vectors.safetensors_format import to_bytes

STEERED = {"model": "tiny", "prompt": "a", "max_tokens": 1, "steering": {"edits": [{"vector": "house"}]}}
FILE = to_bytes(along(4))
MIB = 2**20


def head(method: str, path: str, key: str, *headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "Host: server", f"Authorization: Bearer {key}", "Connection: close", *headers]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


def statuses(received: bytes) -> list[int]:
    return [int(line.split()[1]) for line in received.split(b"\r\n") if line.startswith(b"HTTP/1.1 ")]


@pytest.mark.parametrize("cut", [0, 1, 8, 100, len(FILE) - 1])
def test_an_upload_that_breaks_off_is_not_kept(living: Server, cut: int) -> None:
    received = raw(living, head("PUT", f"{VECTORS}/cut", ADMIN, f"Content-Length: {len(FILE)}") + FILE[:cut])
    assert all(400 <= status < 500 for status in statuses(received)), received
    quiet(received.decode(errors="replace"))


def test_a_chunked_upload_that_breaks_off_is_not_kept(living: Server) -> None:
    first = f"{len(FILE):x}\r\n".encode() + FILE + b"\r\n"
    for rest in (b"", b"5\r\nab", b"zz\r\n", b"-1\r\n", b"ffffffffffffffffff\r\n"):
        received = raw(living, head("PUT", f"{VECTORS}/cut", ADMIN, "Transfer-Encoding: chunked") + first + rest)
        assert all(400 <= status < 500 for status in statuses(received)), (rest, received)


@pytest.mark.parametrize(
    "headers",
    [
        ("Content-Length: 10", "Content-Length: 2000"),
        ("Content-Length: -1",),
        ("Content-Length: 99999999999999999999999",),
        ("Content-Length: 0x10",),
        ("Content-Length: 5", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: gzip, chunked",),
        ("Expect: 200-ok", "Content-Length: 4"),
    ],
    ids=lambda headers: " + ".join(headers),
)
def test_lengths_that_contradict_themselves(living: Server, headers: tuple[str, ...]) -> None:
    received = raw(living, head("PUT", f"{VECTORS}/liar", ADMIN, *headers) + b"0\r\n\r\n", seconds=3)
    assert all(400 <= status < 500 for status in statuses(received)), received


def test_what_is_too_large_is_refused(living: Server) -> None:
    limits = living.get("/v1/steering", headers=USER).json()["limits"]
    for method, path, key, limit in (
        ("PUT", f"{VECTORS}/large", ADMIN, limits["max_upload_bytes"]),
        ("POST", "/v1/completions", INFERENCE, limits["max_body_bytes"]),
        ("POST", "/tokenize", INFERENCE, limits["max_other_body_bytes"]),
    ):
        received = raw(living, head(method, path, key, f"Content-Length: {limit + 1}"), ends=False)
        assert statuses(received) == [413]
    spec_bytes, preset_bytes = limits["max_spec_bytes"], limits["max_preset_bytes"]
    refusal(send(living, "PUT", f"{PRESETS}/large", b" " * (preset_bytes + 1)), status=413)
    largest = spec_bytes + limits["max_inline_bytes"] // 3 * 4
    refusal(send(living, "POST", "/v1/steering/validate", b" " * (largest + 1), key=USER), status=413)


def test_what_says_no_length_is_counted(living: Server) -> None:
    limit = living.get("/v1/steering", headers=USER).json()["limits"]["max_upload_bytes"]

    def endless() -> Iterator[bytes]:
        for _ in range(limit // MIB + 2):
            yield bytes(MIB)

    try:
        answer = httpx.put(f"{living.url}{VECTORS}/large", content=endless(), headers=OPERATOR, timeout=60)
    except httpx.WriteError:
        return  # the server had closed the connection by then
    assert answer.status_code == 413


def test_steering_said_twice_is_refused(living: Server) -> None:
    text = json.dumps(STEERED)
    twice = [
        text[:-1] + ', "steering": null}',
        text[:-1] + ', "steering": false}',
        text[:-1] + ', "steering": {"edits": [{"vector": "nobody"}]}}',
        text[:-1] + ', "\\u0073teering": null}',
    ]
    for body in twice:
        assert refusal(ask(living, body.encode()), body, status=400)["param"] == "steering"
    for body in ('{"edits": [{"vector": "house"}], "edits": []}', '{"edits": [{"vector": "x", "vector": "house"}]}'):
        refusal(send(living, "PUT", f"{PRESETS}/twice", body.encode()), body, status=400)
        refusal(send(living, "POST", "/v1/steering/validate", body.encode(), key=USER), body, status=400)


@pytest.mark.parametrize("name", ["Steering", "STEERING", " steering", "steering "])
def test_steering_by_another_name_is_refused(living: Server, name: str) -> None:
    body = {"model": "tiny", "prompt": "a", "max_tokens": 1, name: STEERED["steering"]}
    error = refusal(ask(living, json.dumps(body).encode()), status=400)
    assert error["param"] == "steering"


@pytest.mark.parametrize(
    "media_type", ["application/json", "text/plain", "multipart/form-data; boundary=x", "x" * 5000]
)
def test_an_upload_of_another_type_is_refused(living: Server, media_type: str) -> None:
    refusal(send(living, "PUT", f"{VECTORS}/typed", FILE, {"content-type": media_type}), media_type, status=415)


@pytest.mark.parametrize("body", BODIES.values(), ids=BODIES)
def test_a_spec_that_is_none_is_refused_by_every_door(living: Server, body: bytes) -> None:
    refusal(send(living, "PUT", f"{PRESETS}/odd", body), body)
    refusal(send(living, "POST", "/v1/steering/validate", body, key=USER), body)
    if body:
        field = b'{"model": "tiny", "prompt": "a", "max_tokens": 1, "steering": ' + body + b"}"
        answer = ask(living, field)
        if body == b"null":
            assert answer.status_code == 200
            return
        assert 400 <= answer.status_code < 500, answer.text[:500]


@pytest.mark.parametrize("value", ['"', '"*', "sha256:", "x" * 9_000, "W/", "\xff", ","])
def test_odd_preconditions_never_match(living: Server, value: str) -> None:
    headers = {b"if-match": value.encode("latin-1")}
    for path, content in ((f"{VECTORS}/house", FILE), (f"{PRESETS}/house", b'{"edits": [{"vector": "house"}]}')):
        for method in ("PUT", "DELETE"):
            answer = send(living, method, path, content if method == "PUT" else b"", headers)
            refusal(answer, value)


@pytest.mark.parametrize("method", ["POST", "PATCH", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"])
def test_methods_that_a_route_has_not(living: Server, method: str) -> None:
    for path in ("/v1/steering", "/v1/steering/stats", "/readyz", "/playground", VECTORS):
        answer = send(living, method, path, b"{}")
        assert answer.status_code in (400, 404, 405), (method, path, answer.status_code)


def test_many_headers_and_long_ones(living: Server) -> None:
    many: dict[str, Any] = {f"x-{i}": "y" for i in range(500)}
    assert send(living, "GET", VECTORS, headers=many).status_code < 500
    received = raw(living, head("GET", VECTORS, INFERENCE, "X-Long: " + "x" * 100_000), seconds=3)
    assert all(status < 500 for status in statuses(received))
    assert complete(living).status_code == 200
