"""Raw bytes on sockets: what no HTTP client sends."""

from __future__ import annotations

import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from helpers.living import ADMIN, INFERENCE

from fuzzing.corpus import PRESETS, VECTORS, vector_files

BODY = b'{"model": "tiny", "prompt": "a", "max_tokens": 1, "steering": {"edits": [{"vector": "house"}]}}'
QUIET_SECONDS = 1.5
"""How long an incomplete request is left waiting before the client goes."""

BAD_LINES = (
    *(b"", b"\0\0\0", b"GET", b"GET /readyz", b"GET /readyz HTTP/9.9", b"/ GET HTTP/1.1", b"\x16\x03\x01"),
    *(b"PRI * HTTP/2.0\r\n\r\nSM", b"GET  /readyz  HTTP/1.1", b"POST /v1/completions\tHTTP/1.1"),
    *(b"GET http://[ HTTP/1.1", b"GET /%zz%00 HTTP/1.1", b"CONNECT a:1 HTTP/1.1"),
    *(b"G" * 70_000, b"GET /" + b"a" * 70_000 + b" HTTP/1.1"),
)

_STATUS = re.compile(rb"HTTP/1\.[01] (\d{3})")


@dataclass(frozen=True)
class Raw:
    """kind: a key of KINDS. pieces: sent one after the other, `pause` seconds apart. ends: the client says that no more
    bytes will come. complete: a whole request, which must be answered.
    """

    kind: str
    pieces: tuple[bytes, ...]
    pause: float = 0.0
    ends: bool = True
    complete: bool = False


def head(method: str, path: str, *headers: str, key: str = INFERENCE, version: str = "HTTP/1.1") -> bytes:
    lines = (
        f"{method} {path} {version}",
        "Host: server",
        f"Authorization: Bearer {key}",
        "Connection: close",
        *headers,
    )
    return "\r\n".join(lines).encode("latin-1", "replace") + b"\r\n\r\n"


def _post(*headers: str, path: str = "/v1/completions") -> bytes:
    return head("POST", path, "Content-Type: application/json", *headers)


def _upload(*headers: str) -> bytes:
    return head("PUT", f"{VECTORS}/fuzz-raw", *headers, key=ADMIN)


def _bad_line(rng: Random) -> Raw:
    line = rng.choice((*BAD_LINES, rng.randbytes(200)))
    return Raw("bad request line", (line + b"\r\nHost: s\r\n\r\n",), ends=rng.random() < 0.8)


def _length(rng: Random) -> Raw:
    right = len(BODY)
    headers = rng.choice(((), ("Content-Length: -1",), ("Content-Length: 0x10",), ("Content-Length: " + "9" * 40,),
                          ("Content-Length:",), (f"Content-Length: {right}", f"Content-Length: {right + 1}"),
                          (f"Content-Length: {right}, {right}",), (f"Content-Length: +{right}",),
                          (f"Content-Length: {right - 20}",), (f"Content-Length: {right + 20}",),
                          (f"Content-Length: {right}", "Transfer-Encoding: chunked"), ("Content-Length: 70000000000",),
                          ("Content-Length\t: 5",), ("Content-Length: 5\r\n 5",)))  # fmt: skip
    start = rng.choice((_post, _upload))(*headers)
    return Raw("wrong Content-Length", (start + BODY,), ends=rng.random() < 0.8)


def _chunked(rng: Random) -> Raw:
    good = f"{len(BODY):x}\r\n".encode() + BODY + b"\r\n"
    rest = rng.choice((b"", b"5\r\nab", b"zz\r\n", b"-1\r\n", b"f" * 20 + b"\r\n", b"0\r\nX: y\r\n\r\n",
                       b"0;a=b\r\n\r\n", b"5;" + b"x" * 70_000 + b"\r\nabcde\r\n", b"\r\n\r\n",
                       b"0\n\n", b"1\r\nab\r\n0\r\n\r\n"))  # fmt: skip
    coding = rng.choice(
        ("chunked", "chunked", "gzip, chunked", "chunked, chunked", "identity", "xchunked", "chunked\0")
    )
    start = rng.choice((_post, _upload))(f"Transfer-Encoding: {coding}")
    return Raw("chunked nonsense", (start + (good if rng.random() < 0.7 else b"") + rest,), ends=rng.random() < 0.8)


def _flood(rng: Random) -> Raw:
    many = [f"X-{number}: {'v' * rng.choice((1, 300))}" for number in range(rng.choice((150, 2000)))]
    headers = rng.choice((many, ["X-Long: " + "x" * 200_000], ["x" * 100_000 + ": y"], ["no colon"], [": empty"],
                          ["Host: other"], ["X: \x00\x01"], [" folded: y"], ["Expect: 100-continue"],
                          ["Upgrade: h2c", "HTTP2-Settings: AAAA"], ["Upgrade: websocket"], ["Authorization: Bearer x"],
                          [f"X-Steering-Admin-Key: {'k' * 9000}"]))  # fmt: skip
    return Raw("header flood", (head("GET", rng.choice((VECTORS, "/readyz")), *headers),), ends=rng.random() < 0.8)


def _slow(rng: Random) -> Raw:
    data = _post(f"Content-Length: {len(BODY)}") + BODY
    cuts = sorted(rng.sample(range(1, len(data)), rng.choice((2, 4, 8))))
    pieces = tuple(data[a:b] for a, b in zip([0, *cuts], [*cuts, len(data)], strict=True))
    if rng.random() < 0.6:
        return Raw("slow body", pieces, pause=rng.choice((0.01, 0.05, 0.2)), ends=False, complete=True)
    return Raw("slow body", pieces[:-1], pause=0.05, ends=rng.random() < 0.5)


def _half_closed(rng: Random) -> Raw:
    file = rng.choice(vector_files())
    start, body = rng.choice(
        ((_upload(f"Content-Length: {len(file)}"), file), (_post(f"Content-Length: {len(BODY)}"), BODY))
    )
    kept = rng.choice((0, 1, 8, len(body) // 2, len(body) - 1))
    return Raw("half-closed", (start + body[:kept],))


def _pipelined(rng: Random) -> Raw:
    keep = _post(f"Content-Length: {len(BODY)}").replace(b"Connection: close\r\n", b"") + BODY
    last = rng.choice((head("GET", PRESETS), head("GET", VECTORS), _post(f"Content-Length: {len(BODY)}") + BODY))
    return Raw("pipelined", (keep * rng.choice((1, 3)) + last,), ends=False, complete=True)


KINDS: dict[str, Callable[[Random], Raw]] = {
    "bad request line": _bad_line,
    "wrong Content-Length": _length,
    "chunked nonsense": _chunked,
    "header flood": _flood,
    "slow body": _slow,
    "half-closed": _half_closed,
    "pipelined": _pipelined,
}


def raw_request(seed: int, number: int) -> Raw:
    """Raw request `number` of the sequence of `seed`; the kinds take turns."""
    rng = Random(f"{seed}:raw:{number}")
    return list(KINDS.values())[number % len(KINDS)](rng)


def exchange(address: tuple[str, int], raw: Raw, seconds: float) -> tuple[bytes, bool]:
    """Send it. Returns all that came back, and whether the server ended the connection in time.

    Raises:
        ConnectionRefusedError: nobody listens any more.
    """
    received = b""
    with socket.create_connection(address, timeout=seconds) as connection:
        connection.settimeout(seconds if raw.complete else QUIET_SECONDS)
        try:
            for piece in raw.pieces:
                connection.sendall(piece)
                time.sleep(raw.pause)
            if raw.ends:
                connection.shutdown(socket.SHUT_WR)
            while got := connection.recv(65536):
                received += got
        except TimeoutError:
            return received, False
        except OSError:  # the server had seen enough
            pass
    return received, True


def statuses_of(received: bytes) -> list[int]:
    return [int(found) for found in _STATUS.findall(received)]


def raw_verdict(raw: Raw, received: bytes, ended: bool) -> str | None:
    """What is wrong with the answers to raw bytes; None: nothing."""
    statuses = statuses_of(received)
    promised = (503,) if b"retry-after" in received.lower() else ()
    if bad := [status for status in statuses if status >= 500 and status not in promised]:
        return f"{bad[0]}, not promised"
    if raw.complete and not (ended and statuses):
        return "no answer"
    return None
