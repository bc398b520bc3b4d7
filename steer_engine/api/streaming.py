"""The `steering` object in the final chunks of a stream of server-sent events."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

_PREFIX, _END = "data: ", "}\n\n"


async def with_report(stream: AsyncGenerator[str, None], report: dict[str, Any]) -> AsyncGenerator[str, None]:
    """The same events; those whose choices have a `finish_reason` also say what was applied."""
    addition = f',"steering":{json.dumps(report, separators=(",", ":"))}'
    async with aclosing(stream):
        async for event in stream:
            yield _with_addition(event, addition) if _is_final(event) else event


def _is_final(event: str) -> bool:
    # Compact JSON is vLLM's own; inside a text the quotes would be escaped. Most events end here, unparsed.
    if '"finish_reason":"' not in event or not event.startswith(_PREFIX) or not event.endswith(_END):
        return False
    chunk = json.loads(event.removeprefix(_PREFIX))
    return any(choice.get("finish_reason") for choice in chunk.get("choices", ()))


def _with_addition(event: str, addition: str) -> str:
    # Spliced in, so that every other byte stays vLLM's.
    return event[: -len(_END)] + addition + _END
