"""What the prefix cache must know of steering: a KV block's key names each edit that touches the block.

For every edit whose scope reaches into the block: (edit digest, first offset, last offset). A block that no edit
touches gets no key, and is shared with unsteered traffic.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steer_engine.program import PROGRAM_KEY

KEY_TAG = "steering"


def block_key(extra_args: Mapping[str, Any] | None, start: int, end: int) -> tuple[Any, ...] | None:
    """The extra key of the block of positions start <= p < end, or None. Cheap and pure: called often per block."""
    if not extra_args or (program := extra_args.get(PROGRAM_KEY)) is None:
        return None
    touching = tuple(
        (digest, max(first, start) - start, min(stop, end) - 1 - start)
        for digest, first, stop in program["identity"]
        if first < end and stop > start
    )
    if not touching:
        return None
    # A tagged pair, as vLLM's own keys are. Preserving norms changes what every edit of the request does.
    return (KEY_TAG, (*touching, "keep_norm") if program["keep_norm"] else touching)
