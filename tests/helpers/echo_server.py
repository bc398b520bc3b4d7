"""What the proxy is tested in front of: says what reached it, and streams or refuses when its body asks for that."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]


def echo(name: str, *, status: int = 200) -> Callable[..., Awaitable[None]]:
    """An ASGI app called `name`; another `status` is what a draining replica answers to everything."""

    async def app(scope: Message, receive: Callable[[], Awaitable[Message]], send: Callable[..., Any]) -> None:
        if scope["type"] != "http":
            return
        body, more = b"", True
        while more:
            message = await receive()
            body += message.get("body", b"")
            more = message.get("more_body", False)
        headers = [(b"content-type", b"application/json"), (b"x-steering", b"sha256:of-the-echo")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        if body.startswith(b'{"stream"'):
            for number in range(3):
                await send({"type": "http.response.body", "body": f"data: {number}\n\n".encode(), "more_body": True})
                await asyncio.sleep(0.3)
            await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
            return
        seen = {
            "server": name,
            "method": scope["method"],
            "raw_path": scope["raw_path"].decode(),
            "query": scope["query_string"].decode(),
            "headers": {key.decode(): value.decode() for key, value in scope["headers"]},
            "num_bytes": len(body),
        }
        await send({"type": "http.response.body", "body": json.dumps(seen).encode()})

    return app
