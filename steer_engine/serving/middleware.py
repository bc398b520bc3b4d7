"""The ASGI middleware: tells what was applied in the answer's headers, and refuses steering where it would be lost."""

from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

from steer_engine.serving import told
from steer_engine.serving.envelope import envelope
from steer_engine.serving.request_field import FIELD, mentions_steering

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

CARRYING_PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        "/v1/messages",
        "/invocations",
    }
)
"""POST paths whose handlers pass the hook that steers; a test walks all routes and compares."""

OWN_PREFIX = "/v1/steering"

HEADER = b"x-steering"
PRESET_HEADER = b"x-steering-preset"

_FORM_FIELD = re.compile(rb'name="?(steering)"?[;\r\n]|(?:^|&)steering=')


class SteeringMiddleware:
    """Pure ASGI, inside vLLM's own authentication.

    Every body that asks for steering ends up steered or refused: on a path that cannot carry it, before the handler
    runs; on one that can, by the handler's hook, and should an answer begin that no hook took account of, that answer
    is replaced by a refusal.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        note = told.Told()
        token = told.current.set(note)
        try:
            await self._handle(scope, receive, send, note)
        finally:
            told.current.reset(token)

    async def _handle(self, scope: Scope, receive: Receive, send: Send, note: told.Told) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/") or "/"
        has_body = scope["method"] in ("POST", "PUT", "PATCH") and not path.startswith(OWN_PREFIX)
        asks = False
        if has_body:
            body, receive = await _read(receive)
            asks = _asks(body)
            if asks and path not in CARRYING_PATHS:
                await _refuse(send, path)
                return
        answer = _Answer(send, note, asks, path)
        await self.app(scope, receive, answer.send)


class _Answer:
    """Wraps `send`: adds the headers to the first message, or replaces the whole answer by a refusal."""

    def __init__(self, send: Send, note: told.Told, asks: bool, path: str) -> None:
        self._send, self._note, self._asks, self._path = send, note, asks, path
        self._replaced = False

    async def send(self, message: Message) -> None:
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            if self._asks and not self._note.seen and message["status"] < 400:
                self._replaced = True
                await _refuse(self._send, self._path)
                return
            message["headers"] = [*message.get("headers", ()), *_headers(self._note, message["status"])]
        await self._send(message)


def _headers(note: told.Told, status: int) -> list[tuple[bytes, bytes]]:
    headers = []
    if note.report is not None and status < 400:
        headers.append((HEADER, note.report["digest"].encode("ascii")))
        if preset := note.report.get("preset"):
            headers.append((PRESET_HEADER, preset.encode("ascii")))
    if note.retry_after is not None and status == 503:
        headers.append((b"retry-after", str(max(1, round(note.retry_after))).encode("ascii")))
    return headers


async def _read(receive: Receive) -> tuple[bytes, Receive]:
    """The whole body, and a `receive` that gives it out again before it goes on listening."""
    messages: list[Message] = []
    while True:
        message = await receive()
        messages.append(message)
        if message["type"] != "http.request" or not message.get("more_body", False):
            break
    body = b"".join(message.get("body", b"") for message in messages)
    replay = iter(messages)

    async def again() -> Message:
        return next(replay, None) or await receive()

    return body, again


def _asks(body: bytes) -> bool:
    # A key may be spelled with \u escapes, and only JSON knows: parse whenever either can be there.
    if b"steer" not in body and rb"\u" not in body:
        return False
    try:
        return mentions_steering(json.loads(body))
    except (ValueError, RecursionError):
        return _FORM_FIELD.search(body) is not None


async def _refuse(send: Send, path: str) -> None:
    carrying = ", ".join(sorted(CARRYING_PATHS - {"/invocations"}))
    message = f"{path[:200]} cannot carry steering; these can: {carrying}."
    body = json.dumps(envelope(message, 400, FIELD)).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": 400, "headers": headers})
    await send({"type": "http.response.body", "body": body})
