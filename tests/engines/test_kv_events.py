"""Events about the KV cache keep vLLM's format: an external indexer can tell steered blocks from plain ones."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from helpers.driving import edit, generate, steering, tokens
from helpers.kv_indexers import INDEXERS, PADDED, Indexer
from helpers.traffic import Start, core_of
from vllm.config import KVEventsConfig
from vllm.distributed.kv_events import BlockStored, EventPublisher, KVEventBatch

from steer_engine import LLM

BLOCK = 32
PROMPT = tokens(3, 3 * BLOCK + 4)
BATCHES = msgspec.msgpack.Decoder(KVEventBatch)


class Keeper(EventPublisher):
    """In place of a socket: each batch as the bytes that would be sent."""

    def __init__(self) -> None:
        super().__init__()
        self.sent: list[bytes] = []

    def publish(self, events: Any) -> None:
        self.sent.append(msgspec.msgpack.encode(events))

    def shutdown(self) -> None:
        pass


@pytest.fixture(scope="module")
def llm(start: Start) -> LLM:
    return start(kv_events_config=KVEventsConfig(enable_kv_cache_events=True, publisher="null"))


def sent(llm: LLM, spec: Any) -> list[bytes]:
    """What a request with `spec` publishes that finds an empty cache."""
    llm.llm_engine.reset_prefix_cache()
    scheduler = core_of(llm).scheduler
    keeper, own = Keeper(), scheduler.kv_event_publisher
    scheduler.kv_event_publisher = keeper
    try:
        generate(llm, [PROMPT], [spec], max_tokens=1)
    finally:
        scheduler.kv_event_publisher = own
    return keeper.sent


def stored(llm: LLM, spec: Any) -> list[BlockStored]:
    """The same, read by vLLM's own classes."""
    batches = [BATCHES.decode(each) for each in sent(llm, spec)]
    return [event for batch in batches for event in batch.events if isinstance(event, BlockStored)]


def blocks(events: list[BlockStored]) -> list[tuple[Any, Any]]:
    """Hash and extra keys of each full block, in order."""
    return [
        (block, key)
        for event in events
        for block, key in zip(event.block_hashes, event.extra_keys or [None] * len(event.block_hashes), strict=True)
    ]


def test_events_tell_steered_blocks(llm: LLM) -> None:
    plain = blocks(stored(llm, None))
    assert len(plain) == 3
    assert [key for _, key in plain] == [None] * 3
    everywhere = blocks(stored(llm, steering(edit("r0"))))
    assert len(everywhere) == 3
    for _, key in everywhere:
        (marker,) = key
        assert PADDED.fullmatch(marker)
    assert not {block for block, _ in everywhere} & {block for block, _ in plain}
    other = blocks(stored(llm, steering(edit("r1"))))
    assert not {block for block, _ in everywhere} & {block for block, _ in other}
    assert blocks(stored(llm, steering(edit("r0")))) == everywhere


def test_a_prompt_that_only_generation_is_steered_behind_is_plain(llm: LLM) -> None:
    assert blocks(stored(llm, steering(edit("r0", scope="generation")))) == blocks(stored(llm, None))


def test_blocks_before_the_first_edit_are_plain(llm: LLM) -> None:
    plain = blocks(stored(llm, None))
    later = blocks(stored(llm, steering(edit("r0", scope={"start": BLOCK + 5, "end": BLOCK + 7}))))
    assert later[0] == plain[0]
    assert later[1][1] is not None
    assert later[2][1] is None
    assert later[2][0] != plain[2][0], "its parent is steered"


@pytest.mark.parametrize("name", INDEXERS)
def test_no_indexer_takes_a_steered_block_for_a_plain_one(llm: LLM, name: str) -> None:
    """Blocks before the first edit stay plain; a plain-looking block after a steered one continues a steered prefix."""
    indexer = Indexer(INDEXERS[name])

    def filed(spec: Any) -> list[Any]:
        return [key for batch in sent(llm, spec) for key in indexer.read(batch)]

    plain = filed(None)
    assert len(plain) == 3
    everywhere, other = filed(steering(edit("r0"))), filed(steering(edit("r1")))
    kept = filed(steering(edit("r0"), preserve_norm=True))
    assert len({*plain, *everywhere, *other, *kept}) == 12
    assert filed(steering(edit("r0"))) == everywhere
    later = filed(steering(edit("r0", scope={"start": BLOCK + 5, "end": BLOCK + 7})))
    assert later[0] == plain[0]
    assert not {*later[1:]} & {*plain, *everywhere}
