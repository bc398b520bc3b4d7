"""The ASGI middleware: adds the steering headers, and refuses steering on paths where it would be lost."""

from __future__ import annotations

import asyncio
import json
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from typing import Any

from steer_engine.api.answers import RequestNote, current_note, envelope, envelope_of, status_of
from steer_engine.api.body_search import search_body
from steer_engine.api.gates import RETRY_AFTER_SECONDS, SHUTTING_DOWN, BodyBudget, BodyShare, DrainGate
from steer_engine.api.request_field import FIELD, model_of
from steer_engine.errors import CapacityError, PayloadTooLargeError, SteerError, SteeringRequestError
from steer_engine.settings import ApiLimits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = Iterable[tuple[bytes, bytes]]

INVOCATIONS = "/invocations"
"""SageMaker's wrapper replaces the body's model name by the one in a header, or removes it."""

MESSAGES = "/v1/messages"
"""vLLM builds Anthropic's error object there, which has no `param`."""

CARRYING_PATHS = frozenset(
    {
        "/v1/chat/completions",
        "/v1/chat/completions/batch",
        "/v1/completions",
        "/v1/responses",
        MESSAGES,
        "/inference/v1/generate",
        INVOCATIONS,
    }
)
"""POST paths whose handlers check steering. A test compares them with all routes."""

OWN_PREFIX = "/v1/steering"

AUDIO_PREFIX = "/v1/audio/"
"""Paths that take whole files."""

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
"""Methods that a draining server answers until its end; the shutdown does not wait for them."""

HEADER = b"x-steering"
PRESET_HEADER = b"x-steering-preset"

EXPOSED_HEADERS = (HEADER, PRESET_HEADER, b"etag", b"retry-after")
"""Headers of answers that scripts of other origins may read; a browser hides all that are not named to it."""

_OF_A_BODY = (b"content-type", b"content-length")

LARGE_BODY_BYTES = 2**18
"""Larger bodies are parsed in another thread."""


class SteeringMiddleware:
    """Pure ASGI, inside vLLM's own authentication.

    A body that requests steering is steered or refused. A path that cannot carry steering is refused before its handler
    runs, and so is steering in a place that nothing reads. Elsewhere the handler's check decides, and an unsteered
    answer is replaced by a refusal. Requests that change or generate something are counted by the drain gate, from
    their whole body to the end of their answer. The size of each body and of all together is limited.
    """

    def __init__(self, app: App, limits: ApiLimits | None = None, drain: DrainGate | None = None) -> None:
        self.app = app
        self._limits = limits or ApiLimits()
        self._bodies = BodyBudget(self._limits.max_bodies_bytes)
        self._drain = drain or DrainGate()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        note = RequestNote()
        token = current_note.set(note)
        share = BodyShare(self._bodies)
        try:
            await self._handle(scope, receive, send, note, share)
        finally:
            share.release()
            current_note.reset(token)

    async def _handle(self, scope: Scope, receive: Receive, send: Send, note: RequestNote, share: BodyShare) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", "")).rstrip("/") or "/"
        has_body = scope["method"] in ("POST", "PUT", "PATCH") and not path.startswith(OWN_PREFIX)
        found = None
        if has_body:
            try:
                body, receive = await _read(receive, *self._largest(path), _declared_length(scope), share)
                if path == INVOCATIONS:
                    note.body_model = model_of(body)
                # Parsing megabytes would block every other request of this process.
                large = len(body) > LARGE_BODY_BYTES
                found = await asyncio.to_thread(search_body, body) if large else search_body(body)
                note.searched = True
            except SteeringRequestError as error:
                await _send_error(send, error)
                return
            except CapacityError as error:
                note.retry_after = error.retry_after
                await _send_error(send, error, _headers(note, 503, self._drain))
                return
            if found is not None and path not in CARRYING_PATHS:
                await _refuse(send, path)
                return
            if found is not None and found.misplaced:
                await _send_error(send, found.refusal)
                return
        if any(name == b"origin" for name, _ in scope["headers"]):
            send = _exposing(send)
        answer = _Answer(send, note, found is not None, path, self._drain)
        if scope["method"] in SAFE_METHODS:
            await self.app(scope, receive, answer.send)
            return
        try:
            self._drain.enter()
        except CapacityError:
            await answer.refuse_for_shutdown()
            return
        try:
            await self.app(scope, receive, answer.send)
        except Exception:
            if answer.begun or not self._drain.closed:
                raise
            await answer.refuse_for_shutdown()
        finally:
            self._drain.leave()

    def _largest(self, path: str) -> tuple[int, str]:
        """The largest body that a path takes, and the name of that limit."""
        if path in CARRYING_PATHS or path.startswith(AUDIO_PREFIX):
            return self._limits.max_body_bytes, "max_body_bytes"
        name = min("max_other_body_bytes", "max_body_bytes", key=lambda name: int(getattr(self._limits, name)))
        return getattr(self._limits, name), name


class _Answer:
    """Wraps `send`: adds the headers to the first message, or replaces the whole answer by a refusal."""

    def __init__(self, send: Send, note: RequestNote, steers: bool, path: str, drain: DrainGate) -> None:
        self._send, self._note, self._steers, self._path, self._drain = send, note, steers, path, drain
        self._replaced = False
        self.begun = False

    async def refuse_for_shutdown(self) -> None:
        """Send a 503: the server is shutting down."""
        self._replaced = self.begun = True
        error = CapacityError(SHUTTING_DOWN, RETRY_AFTER_SECONDS)
        self._note.retry_after = error.retry_after
        await _send_json(self._send, envelope_of(error), 503, _headers(self._note, 503, self._drain))

    async def send(self, message: Message) -> None:
        if self._replaced:
            return
        if message["type"] == "http.response.start":
            if message["status"] == 500 and self._drain.closed:
                # An error during the shutdown is caused by it.
                await self.refuse_for_shutdown()
                return
            self.begun = True
            if self._steers and self._note.report is None and message["status"] < 400:
                self._replaced = True
                await _refuse(self._send, self._path)
                return
            headers = [*message.get("headers", ()), *_headers(self._note, message["status"], self._drain)]
            if self._path == MESSAGES and message["status"] >= 400 and self._note.refusal is not None:
                self._replaced = True
                kept = [(name, value) for name, value in headers if name.lower() not in _OF_A_BODY]
                content = {"type": "error"} | envelope_of(self._note.refusal)
                await _send_json(self._send, content, message["status"], kept)
                return
            message["headers"] = headers
        await self._send(message)


def _headers(note: RequestNote, status: int, drain: DrainGate) -> list[tuple[bytes, bytes]]:
    headers = []
    if drain.closed:
        # A kept connection would soon be cut, perhaps during the next request on it.
        headers.append((b"connection", b"close"))
    if note.report is not None and status < 400:
        headers.append((HEADER, note.report["digest"].encode("ascii")))
        if preset := note.report.get("preset"):
            headers.append((PRESET_HEADER, preset.encode("ascii")))
    if note.retry_after is not None and status == 503:
        headers.append((b"retry-after", str(max(1, round(note.retry_after))).encode("ascii")))
    return headers


def _exposing(send: Send) -> Send:
    """Names the headers of EXPOSED_HEADERS that an answer has. Whether its origin may read it at all, vLLM decides."""

    async def named(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = list(message.get("headers", ()))
            present = {name.lower() for name, _ in headers}
            if exposed := [name for name in EXPOSED_HEADERS if name in present]:
                message["headers"] = [*headers, (b"access-control-expose-headers", b", ".join(exposed))]
        await send(message)

    return named


def _declared_length(scope: Scope) -> int:
    values = [value for name, value in scope["headers"] if name == b"content-length"]
    return int(values[0]) if values and values[0].isdigit() else 0


async def _read(receive: Receive, max_bytes: int, limit: str, declared: int, share: BodyShare) -> tuple[bytes, Receive]:
    """The whole body, and a `receive` that gives it in one message before it waits for further messages.

    limit: the name of `max_bytes`. share: counts what is held.

    Raises:
        PayloadTooLargeError: the declared length, before anything is read, or the counted length is too large.
        CapacityError: other bodies use the budget.
    """
    pieces: list[bytes] = []
    pending: deque[Message] = deque()
    counted, more = 0, True
    while more and max(declared, counted) <= max_bytes:
        message = await receive()
        if message["type"] != "http.request":
            pending.append(message)  # the client has gone
            break
        piece = message.get("body", b"")
        share.add(len(piece))
        pieces.append(piece)
        counted += len(piece)
        more = message.get("more_body", False)
    if max(declared, counted) > max_bytes:
        raise PayloadTooLargeError(f"The body may have at most {max_bytes} bytes ({limit}).", "body")
    body = b"".join(pieces)
    pending.appendleft({"type": "http.request", "body": body, "more_body": bool(pending)})

    async def again() -> Message:
        return pending.popleft() if pending else await receive()

    return body, again


async def _refuse(send: Send, path: str) -> None:
    carrying = ", ".join(sorted(CARRYING_PATHS - {INVOCATIONS}))
    message = f"{path[:200]} cannot carry steering; these can: {carrying}."
    await _send_json(send, envelope(message, 400, FIELD), 400)


async def _send_error(send: Send, error: SteerError, headers: Headers = ()) -> None:
    await _send_json(send, envelope_of(error), status_of(error), headers)


async def _send_json(send: Send, content: dict[str, Any], status: int, headers: Headers = ()) -> None:
    body = json.dumps(content).encode()
    own = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": [*own, *headers]})
    await send({"type": "http.response.body", "body": body})
