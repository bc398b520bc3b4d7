"""How indexers outside of vLLM read its KV events: under which keys they file the blocks of an engine.

Written from the formats that llm-d's KV cache indexer and Dynamo's KV router document and accept (2026). An indexer
knows of a request its tokens, adapter and images only. A block is taken for a plain one if its key is that of the plain
block.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import msgspec

PADDED = re.compile("[0-9a-fA-F]{16}0{48}")
ANY_DIGEST = re.compile("[0-9a-fA-F]{64}")
SALT = "dynamo-cache-salt:"

Features = Callable[[Any], list[str]]
"""The extra keys of one block (None, or a list) -> what of them enters its key."""


def of_llm_d(keys: Any) -> list[str]:
    """A text is the digest of an image, and so is the first item of a list if it is a text. Others are skipped."""
    first = [entry[0] if isinstance(entry, list) and entry else entry for entry in keys or ()]
    return [entry for entry in first if isinstance(entry, str)]


def of_dynamo(keys: Any, digest: re.Pattern[str] = PADDED) -> list[str]:
    """Digests of images in the router's own form, alone or with an offset.

    Raises:
        ValueError: an entry of another type; Dynamo drops the whole batch.
    """
    texts = []
    for entry in keys or ():
        if isinstance(entry, list):
            is_pair = len(entry) == 2 and isinstance(entry[0], str) and isinstance(entry[1], int)
            if not is_pair and not all(isinstance(byte, int) and 0 <= byte < 256 for byte in entry):
                raise ValueError(f"no known extra key: {entry}")
            texts.append(entry[0] if is_pair else "")
        elif isinstance(entry, str):
            texts.append(entry)
        elif not isinstance(entry, bytes | int | float):
            raise ValueError(f"no known extra key: {entry}")
    return [text[:16] for text in texts if digest.fullmatch(text)] + [text for text in texts if text.startswith(SALT)]


def of_earlier_dynamo(keys: Any) -> list[str]:
    """Before the router had a form of its own, every text of 64 hexadecimal digits was a digest."""
    return of_dynamo(keys, ANY_DIGEST)


INDEXERS: dict[str, Features] = {"llm-d": of_llm_d, "Dynamo": of_dynamo, "earlier Dynamo": of_earlier_dynamo}


@dataclass
class Indexer:
    """Files stored blocks. keys: hash of a block -> key, which continues its parent's."""

    features: Features
    keys: dict[Any, tuple[Hashable, ...]] = field(default_factory=dict)

    def read(self, sent: bytes) -> list[tuple[Hashable, ...]]:
        """The keys of the blocks that a batch stores, in order. Raises ValueError where the indexer would drop it."""
        found = []
        for event in msgspec.msgpack.decode(sent)[1]:
            if event["type"] != "BlockStored":
                continue
            size, key = event["block_size"], self.keys.get(event["parent_block_hash"], ())
            extra = event.get("extra_keys") or [None] * len(event["block_hashes"])
            for place, block in enumerate(event["block_hashes"]):
                tokens = tuple(event["token_ids"][place * size : (place + 1) * size])
                key = (*key, (tokens, event["lora_name"], *self.features(extra[place])))
                self.keys[block] = key
                found.append(key)
        return found
