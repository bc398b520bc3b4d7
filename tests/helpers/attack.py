"""Ways to send what no client should, and what every answer to it must keep to."""

from __future__ import annotations

import re
import socket
from collections.abc import Mapping
from typing import Any

import httpx

from helpers.living import OPERATOR, USER
from helpers.server_process import Server

MAX_ECHO = 200
VECTORS, PRESETS = "/v1/steering/vectors", "/v1/steering/presets"

_INSIDE = re.compile(r"Traceback|site-packages|steer_engine/|\.py\b|/tmp/|/root|/home|\.steer-engine|Errno")


def send(
    server: Server,
    method: str,
    path: str,
    content: bytes = b"",
    headers: Mapping[str, str] | None = None,
    *,
    key: Mapping[str, str] = OPERATOR,
) -> httpx.Response:
    """One request as it is written: the path is not normalised, nothing is retried."""
    url = httpx.URL(server.url).copy_with(raw_path=path.encode("latin-1"))
    request = server.client.build_request(method, url, content=content, headers={**key, **(headers or {})})
    return server.client.send(request)


def ask(server: Server, content: bytes, path: str = "/v1/completions") -> httpx.Response:
    return send(server, "POST", path, content, {"content-type": "application/json"}, key=USER)


def raw(server: Server, data: bytes, *, seconds: float = 10.0, ends: bool = True) -> bytes:
    """Bytes on a socket, and all that comes back until the server closes or says no more.

    ends: tell the server that no more bytes will come.
    """
    with socket.create_connection(("127.0.0.1", server.port), timeout=seconds) as connection:
        connection.sendall(data)
        if ends:
            connection.shutdown(socket.SHUT_WR)
        received = b""
        try:
            while piece := connection.recv(65536):
                received += piece
        except (TimeoutError, ConnectionResetError):
            pass
        return received


def refusal(answer: httpx.Response, sent: bytes | str = b"", *, status: int | None = None) -> dict[str, Any]:
    """The error of an answer: a 4xx in the usual format, which shows nothing of the server and echoes little."""
    assert 400 <= answer.status_code < 500, (answer.status_code, answer.text[:1000])
    if status is not None:
        assert answer.status_code == status, answer.text[:1000]
    quiet(answer.text, sent)
    return dict(answer.json()["error"])


def quiet(text: str, sent: bytes | str = b"") -> None:
    """No path of the server, and at most MAX_ECHO characters in a row of what came in."""
    found = _INSIDE.search(text)
    if found is not None:
        assert found.group() in (sent if isinstance(sent, str) else sent.decode(errors="replace")), text[:1000]
    came_in = sent if isinstance(sent, str) else sent.decode(errors="replace")
    for at in range(len(text) - MAX_ECHO):
        assert text[at : at + MAX_ECHO + 1] not in came_in, text[:1000]
