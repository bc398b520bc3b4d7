"""Prefix-cache identity: a block's key names what was applied inside it, and nothing else."""

from __future__ import annotations

import pickle
import time
from typing import Any

import pytest
from helpers.random_specs import VECTORS, covers, resolved, specs
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_engine.parse import parse_spec
from steer_engine.program import KEY_TAG, PROGRAM_KEY, Program, block_key

BLOCK = 4
Key = tuple[Any, ...] | None


def keys_of(raw: Any, prompt_len: int, num_positions: int = 24) -> list[Key]:
    """The keys of the request's blocks of BLOCK positions each."""
    extra_args = {PROGRAM_KEY: resolved(raw).template.at(prompt_len).to_wire()}
    return [block_key(extra_args, start, start + BLOCK) for start in range(0, num_positions, BLOCK)]


def one(**fields: Any) -> dict[str, Any]:
    return {"edits": [{"vector": "a", **fields}]}


def digest(**fields: Any) -> str:
    return resolved(one(**fields)).edits[0].edit.digest


@pytest.mark.parametrize("extra_args", [None, {}, {"other": 1}, {PROGRAM_KEY: Program().to_wire()}])
def test_unsteered_blocks_have_no_key(extra_args: Any) -> None:
    assert block_key(extra_args, 0, BLOCK) is None


def test_a_covered_block_names_the_edit_and_its_offsets() -> None:
    assert keys_of(one(), 6) == [(KEY_TAG, ((digest(), 0, 3),))] * 6


def test_offsets_count_from_the_block() -> None:
    key = digest()
    assert keys_of(one(scope={"start": 6, "end": 13}), 6) == [
        None,
        (KEY_TAG, ((key, 2, 3),)),
        (KEY_TAG, ((key, 0, 3),)),
        (KEY_TAG, ((key, 0, 0),)),
        None,
        None,
    ]


def test_edges_of_a_scope() -> None:
    assert keys_of(one(scope={"start": 4, "end": 8}), 6)[:3] == [None, (KEY_TAG, ((digest(), 0, 3),)), None]
    assert keys_of(one(scope={"start": 7, "end": 8}), 6)[1] == (KEY_TAG, ((digest(), 3, 3),))


@pytest.mark.parametrize("prompt_len", range(1, 20))
def test_generation_shares_every_block_before_the_last_prompt_token(prompt_len: int) -> None:
    keys = keys_of(one(scope="generation"), prompt_len)
    for number, key in enumerate(keys):
        assert (key is None) == ((number + 1) * BLOCK <= prompt_len - 1)


def test_prompts_of_one_length_share_and_generation_goes_its_own_way() -> None:
    plain, prompt = keys_of(one(), 8), keys_of(one(scope="prompt"), 8)
    assert plain[:2] == prompt[:2]
    assert prompt[2:] == [None] * 4
    assert plain[2:] != prompt[2:]


def test_the_name_of_a_vector_is_not_in_the_key() -> None:
    assert keys_of(one(), 6) == keys_of(one(vector=VECTORS["a"].digest), 6)


def test_adds_in_any_order_and_sum_share() -> None:
    a, b = {"vector": "a", "scale": 0.5}, {"vector": "b", "scale": 2}
    assert keys_of({"edits": [a, b]}, 6) == keys_of({"edits": [b, a]}, 6)
    assert keys_of({"edits": [a, b, a]}, 6) == keys_of({"edits": [{"vector": "a", "scale": 1}, b]}, 6)


def test_all_that_does_nothing_shares_with_unsteered_traffic() -> None:
    v = {"vector": "a"}
    for raw in (one(scale=0), {"edits": [v, {**v, "scale": -1}]}, one(scale=0) | {"preserve_norm": True}):
        assert keys_of(raw, 6) == [None] * 6


def test_different_steering_differs() -> None:
    raws = [
        one(),
        one(scale=2),
        one(vector="c"),
        one(op="ablate"),
        one(blocks=1),
        one(gate={"vector": "c", "min_cos": 0.0}),
        one(gate={"vector": "c", "min_cos": 0.1}),
        one() | {"preserve_norm": True},
        {"edits": [{"vector": "a", "op": "ablate"}, {"vector": "a"}]},
        {"edits": [{"vector": "a"}, {"vector": "a", "op": "ablate"}]},
        one(scope={"start": 1}),
        one(scope={"end": 3}),
    ]
    assert len({keys_of(raw, 6)[0] for raw in raws}) == len(raws)


def test_kept_norms_count_only_where_something_is_applied() -> None:
    raw = one(scope="generation") | {"preserve_norm": True}
    keys = keys_of(raw, 9)
    assert keys[:2] == [None, None]
    assert keys[2] != keys_of(one(scope="generation"), 9)[2]


def test_a_key_is_a_tagged_pair_that_hashes_and_pickles() -> None:
    (tag, named), *_ = keys_of(one() | {"preserve_norm": True}, 6)  # type: ignore[misc]
    assert tag == KEY_TAG
    hash(named)
    assert pickle.loads(pickle.dumps((tag, named))) == (tag, named)


@settings(max_examples=60, deadline=None)
@given(specs(), st.integers(1, 14))
def test_a_key_says_exactly_where_each_edit_is_applied(raw: Any, prompt_len: int) -> None:
    """Rebuilt position by position."""
    spec = parse_spec(raw)
    assert spec is not None
    assert spec.edits is not None
    edits = resolved(raw).template.edits
    for number, key in enumerate(keys_of(raw, prompt_len)):
        inside = range(number * BLOCK, (number + 1) * BLOCK)
        covered = [
            [p - inside[0] for p in inside if edit.scope.at(prompt_len)[0] <= p < edit.scope.at(prompt_len)[1]]
            for edit in edits
        ]
        named = tuple(
            (edit.digest, offsets[0], offsets[-1]) for edit, offsets in zip(edits, covered, strict=True) if offsets
        )
        kept = ("keep_norm",) if raw["preserve_norm"] else ()
        assert key == ((KEY_TAG, (*named, *kept)) if named else None)
        if not any(covers(edit.scope, position, prompt_len) for edit in spec.edits for position in inside):
            assert key is None


def test_a_key_is_cheap() -> None:
    """It is made for every block of every request, in the scheduler."""
    edits = [{"vector": "a", "scale": 0.5, "scope": {"start": i}} for i in range(4)]
    steered = {PROGRAM_KEY: resolved({"edits": edits}).template.at(100).to_wire()}
    for extra_args, microseconds in ((steered, 50), ({"other": 1}, 5), (None, 5)):
        started = time.process_time()
        for start in range(0, 16_000, 16):
            block_key(extra_args, start, start + 16)
        assert (time.process_time() - started) / 1000 < microseconds * 1e-6
