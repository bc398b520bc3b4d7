"""The bodies of requests, as a server receives them: `--middleware helpers.body_record.BodyRecord` writes them down."""

from __future__ import annotations

import json
import os
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

RECORD_ENV = "STEER_TEST_BODIES"
"""The file, in the server's environment. A line is one body as JSON."""

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class BodyRecord:
    """ASGI middleware. It changes nothing."""

    def __init__(self, app: Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "POST":
            await self._app(scope, receive, send)
            return
        body = bytearray()

        async def recorded() -> Message:
            message = await receive()
            if message["type"] == "http.request":
                body.extend(message.get("body", b""))
                if not message.get("more_body"):
                    with Path(os.environ[RECORD_ENV]).open("a") as record:
                        record.write(json.dumps(json.loads(body)) + "\n")
            return message

        await self._app(scope, recorded, send)


class Bodies:
    """The record of one server, for a test."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.path.touch()

    def count(self) -> int:
        return len(self.path.read_text().splitlines())

    def since(self, count: int) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()[count:]]
