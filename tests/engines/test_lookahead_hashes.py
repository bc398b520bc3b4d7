"""With an EAGLE or MTP drafter, vLLM 0.33 hashes a KV block together with the tokens after it: steering included.

A drafter's KV at the last position of a block depends on those tokens. Unequal steering of them is told apart too, and
what lies behind them is shared as ever.
"""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
from helpers.driving import tokens
from helpers.kv_indexers import INDEXERS, PADDED, Indexer
from helpers.stepping import program
from vllm import SamplingParams
from vllm.distributed.kv_events import BlockStored, KVEventBatch
from vllm.utils.hashing import sha256
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.request import Request

from steer_engine.program import PROGRAM_KEY
from steer_engine.vllm.plugin import register

pytestmark = [
    pytest.mark.v1_only,  # no engine
    pytest.mark.skipif(
        not hasattr(kv_cache_utils, "generate_lookahead_block_hash_extra_keys"),
        reason="block hashes look ahead from vLLM 0.33 on",
    ),
]

BLOCK, NUM_BLOCKS = 8, 3
PROMPT = tokens(3, NUM_BLOCKS * BLOCK + 4)
Edit = dict[str, Any]


def at(first: int, last: int | None = None, **fields: Any) -> Edit:
    return {"scope": {"start": first, "end": (first if last is None else last) + 1}, **fields}


@pytest.fixture(autouse=True)
def installed() -> None:
    register()
    if not hasattr(kv_cache_utils, "NONE_HASH"):
        kv_cache_utils.init_none_hash(sha256)


def request(lookahead: int, *edits: Edit) -> Request:
    """With the hashes of its blocks."""
    extra = {PROGRAM_KEY: program(*edits, prompt_len=len(PROMPT)).to_wire()} if edits else None
    hasher: Any = kv_cache_utils.get_request_block_hasher
    return Request(
        "r",
        prompt_token_ids=list(PROMPT),
        sampling_params=SamplingParams(max_tokens=1, extra_args=extra),
        pooling_params=None,
        block_hasher=hasher(BLOCK, sha256, lookahead),
    )


def hashes(lookahead: int, *edits: Edit) -> list[bytes]:
    found = list(request(lookahead, *edits).block_hashes)
    assert len(found) == NUM_BLOCKS
    return found


def cached(lookahead: int, *edits: Edit) -> BlockPool:
    """A prefix cache that holds the request's blocks, and has published that."""
    make: Any = BlockPool
    pool: BlockPool = make(
        NUM_BLOCKS + 1, True, BLOCK, enable_kv_cache_events=True, num_hash_lookahead_tokens=lookahead
    )
    pool.cache_full_blocks(
        request=request(lookahead, *edits),
        blocks=pool.get_new_blocks(NUM_BLOCKS),
        num_cached_blocks=0,
        num_full_blocks=NUM_BLOCKS,
        block_size=BLOCK,
        kv_cache_group_id=0,
    )
    return pool


@pytest.mark.parametrize("lookahead", [1, 2])
def test_unequal_steering_of_the_tokens_ahead_is_told_apart(lookahead: int) -> None:
    plain = hashes(lookahead)
    ahead = BLOCK + lookahead - 1  # the last token that the first block's hash covers
    specs = [[at(ahead)], [at(ahead, scale=0.5)], [at(BLOCK - 1)], [at(BLOCK - 1, ahead)], [{}]]
    first = [plain[0], *(hashes(lookahead, *edits)[0] for edits in specs)]
    assert len({*first}) == len(first)
    assert hashes(lookahead, at(ahead)) == hashes(lookahead, at(ahead))


@pytest.mark.parametrize("lookahead", [1, 2])
def test_blocks_before_the_first_edit_are_shared_with_plain_traffic(lookahead: int) -> None:
    plain, behind = hashes(lookahead), hashes(lookahead, at(BLOCK + lookahead))
    assert behind[0] == plain[0]
    assert behind[1] != plain[1]


@pytest.mark.parametrize("lookahead", [0, 1, 2])
def test_the_prefix_cache_finds_equal_steering_only(lookahead: int) -> None:
    pool = cached(lookahead, at(BLOCK))
    same, other = hashes(lookahead, at(BLOCK)), hashes(lookahead, at(BLOCK, scale=0.5))
    assert all(pool.get_cached_block(each, [0]) for each in same)  # type: ignore[arg-type]
    shared = 0 if lookahead else 1
    assert [bool(pool.get_cached_block(each, [0])) for each in other] == [True] * shared + [False] * (3 - shared)  # type: ignore[arg-type]
    plain = hashes(lookahead)
    assert [bool(pool.get_cached_block(each, [0])) for each in plain] == [True] * shared + [False] * (3 - shared)  # type: ignore[arg-type]


@pytest.mark.parametrize("lookahead", [1, 2])
def test_events_name_the_steering_of_the_tokens_ahead(lookahead: int) -> None:
    (stored,) = cached(lookahead, at(BLOCK)).take_events()
    assert isinstance(stored, BlockStored)
    assert stored.extra_keys is not None
    first, second, third = stored.extra_keys
    for keys in (first, second):
        (marker,) = keys or ()
        assert PADDED.fullmatch(str(marker))
    assert first != second, "the same edit at another place of the block"
    assert third is None


@pytest.mark.parametrize("name", INDEXERS)
def test_no_indexer_takes_a_steered_block_for_a_plain_one(name: str) -> None:
    indexer = Indexer(INDEXERS[name])

    def filed(*edits: Edit) -> list[Any]:
        return indexer.read(msgspec.msgpack.encode(KVEventBatch(0.0, cached(1, *edits).take_events())))

    plain, steered = filed(), filed(at(BLOCK))
    assert len(plain) == len(steered) == NUM_BLOCKS
    assert not {*plain} & {*steered}
