"""Prefix-cache identity: a block's key names what was applied inside it, and nothing else."""

from __future__ import annotations

import pickle
import time
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from helpers.oracle_when import covered
from helpers.random_specs import MODEL, ROW_SETS, VECTORS, covers, file_source, resolved, specs
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from steer_engine.parse import parse_spec
from steer_engine.program import KEY_TAG, Program, block_key
from steer_engine.resolve import resolve
from steer_engine.settings import Limits
from steer_engine.site import SITES_IN_BLOCKS
from steer_engine.trigger import Windows
from steer_engine.vectors import ControlVector, RowSet

BLOCK = 4
Key = tuple[Any, ...] | None


def keys_of(raw: Any, prompt_len: int, tokens: list[int] | None = None) -> list[Key]:
    """The keys of the request's blocks of BLOCK positions each, as the scheduler asks for them: block by block."""
    tokens = list(range(24)) if tokens is None else tokens
    program = resolved(raw).template.at(prompt_len)
    wire, windows, keys = program.to_wire(), [Windows(trigger) for trigger in program.triggers], []
    for start in range(0, len(tokens), BLOCK):
        for each in windows:
            each.extend(tokens[start : start + BLOCK])
        keys.append(block_key(wire, windows, start, start + BLOCK))
    return keys


def one(**fields: Any) -> dict[str, Any]:
    return {"edits": [{"vector": "a", **fields}]}


def digest(**fields: Any) -> str:
    return resolved(one(**fields)).edits[0].edit.digest


def test_unsteered_blocks_have_no_key() -> None:
    assert block_key(Program().to_wire(), [], 0, BLOCK) is None


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


FEATURE = {"vector": "relu", "op": "feature", "feature": 3, "target": 2.0, "blocks": 2}
LOW_RANK = {"vector": "reft", "op": "low_rank"}
ROTATE = {"vector": "a", "op": "rotate", "toward": "c", "degrees": 30}
GATED = {"vector": "a", "gate": {"vector": "c", "min_dot": 0.5}}
SITED = replace(MODEL, sites=SITES_IN_BLOCKS)
DIFFERENT: dict[str, list[dict[str, Any]]] = {
    "features": [
        FEATURE,
        FEATURE | {"feature": 7},
        FEATURE | {"feature": [3, 7]},
        FEATURE | {"vector": "jump"},
        FEATURE | {"target": 2.5},
        {key: value for key, value in FEATURE.items() if key != "target"} | {"add": 2.0},
        {key: value for key, value in FEATURE.items() if key != "target"} | {"scale": 2.0},
    ],
    "ranks": [
        LOW_RANK,
        LOW_RANK | {"scale": 0.5},
        LOW_RANK | {"blocks": 1},
        LOW_RANK | {"blocks": 3},
        LOW_RANK | {"vector": "reft-rank-1"},
        LOW_RANK | {"vector": "reft-without-bias"},
    ],
    "angles": [
        ROTATE,
        ROTATE | {"degrees": 31},
        ROTATE | {"degrees": -30},
        ROTATE | {"vector": "c", "toward": "a"},
        ROTATE | {"toward": "b", "blocks": 1},
        ROTATE | {"blocks": 1},
        {key: value for key, value in ROTATE.items() if key != "degrees"} | {"to_degrees": 30},
    ],
    "gates": [
        {"vector": "a"},
        GATED,
        GATED | {"gate": {"vector": "c", "min_dot": 0.25}},
        GATED | {"gate": {"vector": "c", "max_dot": 0.5}},
        GATED | {"gate": {"vector": "c", "min_cos": 0.5}},
        GATED | {"gate": {"vector": "b", "min_dot": 0.5}, "blocks": [1, 2, 3]},
        GATED | {"gate": {"vector": "relu", "feature": 3, "min_dot": 0.5}, "blocks": 2},
        GATED | {"gate": {"vector": "relu", "feature": 7, "min_dot": 0.5}, "blocks": 2},
    ],
    "sites": [{"vector": "a"}, {"vector": "a", "site": "attn"}, {"vector": "a", "site": "mlp"}],
}


def file_of(name: str) -> ControlVector | RowSet:
    """`file_source`, and two files that differ from `reft` in one thing: rank 1 of it, and no bias."""
    reft = ROW_SETS["reft"]
    if name == "reft-rank-1":
        parts = {part: {b: rows[:1] for b, rows in getattr(reft, part).items()} for part in ("read", "write", "bias")}
        return replace(reft, **parts)
    if name == "reft-without-bias":
        return replace(reft, bias={block: np.zeros_like(bias) for block, bias in reft.bias.items()})
    return file_source(name)


@pytest.mark.parametrize("kind", DIFFERENT)
def test_different_rows_angles_gates_and_sites_differ(kind: str) -> None:
    """Each edit has a key of its own, and gives it again, alone and behind an add that all have in common."""
    for before in ([], [{"vector": "c", "blocks": 0}]):
        keys = []
        for edit in DIFFERENT[kind]:
            for _ in range(2):
                spec = parse_spec({"edits": [*before, edit]})
                assert spec is not None
                keys.append(block_key(resolve(spec, file_of, SITED, Limits()).template.at(6).to_wire(), [], 0, BLOCK))
        assert keys[::2] == keys[1::2]
        assert None not in keys
        assert len(set(keys)) == len(DIFFERENT[kind])


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


# Triggers, schedules and conditions

OPEN, CLOSE = 90, 91


def with_tokens(**places: int) -> list[int]:
    """24 tokens that are no triggers, except at some places."""
    tokens = list(range(24))
    for name, place in places.items():
        tokens[place] = {"opened": OPEN, "again": OPEN, "closed": CLOSE}[name]
    return tokens


def test_blocks_before_the_first_trigger_are_shared_with_plain_traffic() -> None:
    key = digest(scope={"after": OPEN})
    assert keys_of(one(scope={"after": OPEN}), 6, with_tokens(opened=9)) == [
        None,
        None,
        (KEY_TAG, ((key, 2, 3),)),
        *[(KEY_TAG, ((key, 0, 3),))] * 3,
    ]
    assert keys_of(one(scope={"after": OPEN}), 6, with_tokens()) == [None] * 6


def test_a_window_that_closes_and_opens_again_is_named_in_parts() -> None:
    scope = {"after": OPEN, "until": CLOSE, "each": True}
    key = digest(scope=scope)
    keys = keys_of(one(scope=scope), 6, with_tokens(opened=4, closed=6, again=10))
    assert keys[:3] == [None, (KEY_TAG, ((key, 1, 1),)), (KEY_TAG, ((key, 3, 3),))]


def test_an_exception_is_left_out() -> None:
    scope = {"except": {"after": OPEN, "until": CLOSE}}
    key = digest(scope=scope)
    keys = keys_of(one(scope=scope), 6, with_tokens(opened=4, closed=14))
    assert keys[:4] == [
        (KEY_TAG, ((key, 0, 3),)),
        (KEY_TAG, ((key, 0, 0),)),
        None,
        (KEY_TAG, ((key, 2, 3),)),
    ]


def test_a_condition_keeps_the_prompt_shared() -> None:
    """The edit begins at the last prompt token, whatever its scope."""
    when = {"vector": "c", "blocks": 0, "above": 0.1}
    keys = keys_of(one(blocks="1-3", when=when), 10)
    assert keys[:2] == [None, None]
    assert keys[2] == (KEY_TAG, ((digest(blocks="1-3", when=when), 1, 3),))
    assert keys[2] != keys_of(one(blocks="1-3", when=when | {"above": 0.2}), 10)[2]
    assert keys[2] != keys_of(one(blocks="1-3", scope="generation"), 10)[2]


def test_schedules_differ() -> None:
    schedules = [
        None,
        *({"kind": kind, "over": over, "to": 0.5} for kind in ("linear", "exponential") for over in (4, 5)),
    ]
    keys = [keys_of(one(schedule=schedule), 6)[0] for schedule in schedules]
    assert len(set(keys)) == len(keys)
    assert keys_of(one(schedule={"kind": "linear", "over": 4, "to": 1}), 6)[0] == keys[0]


SEQUENCES = [[OPEN], [CLOSE], [OPEN, 1], [1, OPEN], [0, 0]]
triggers = st.fixed_dictionaries(
    {"after": st.sampled_from(SEQUENCES[:3])},
    optional={
        "until": st.sampled_from(SEQUENCES[3:]),
        "each": st.booleans(),
        "tokens": st.integers(1, 6),
    },
)
windows = st.fixed_dictionaries({}, optional={"except": triggers, "start": st.integers(-8, 8)}).flatmap(
    lambda rest: triggers.map(lambda trigger: rest | trigger)
)


@settings(max_examples=80, deadline=None)
@given(windows, st.integers(1, 20), st.lists(st.sampled_from([0, 1, OPEN, CLOSE]), min_size=24, max_size=24))
def test_a_key_names_the_covered_positions_of_a_trigger(scope: Any, prompt_len: int, tokens: list[int]) -> None:
    """Against the definition, which looks at each position on its own."""
    whole = {name: scope[name] for name in scope.keys() & {"after", "until", "each", "tokens"}}
    assume("except" not in scope or {"each": False} | scope["except"] != {"each": False} | whole)
    covered_T = covered(scope, tokens, prompt_len)[0]
    for number, key in enumerate(keys_of(one(scope=scope), prompt_len, tokens)):
        named = {offset for _, first, last in (key[1] if key else ()) for offset in range(first, last + 1)}
        inside = covered_T[number * BLOCK : (number + 1) * BLOCK]
        assert named == set(inside.nonzero().flatten().tolist())


def test_a_key_is_cheap() -> None:
    """It is made for every block of every request, in the scheduler."""
    edits = [{"vector": "a", "scale": 0.5, "scope": {"start": i}} for i in range(4)]
    spans = resolved({"edits": edits}).template.at(100)
    scope = {"after": 1, "until": 2, "each": True, "except": {"after": 3, "tokens": 2}}
    triggered = resolved({"edits": [{"vector": "a", "scope": scope}]}).template.at(100)
    for program, microseconds in ((spans, 50), (triggered, 150)):
        wire, windows = program.to_wire(), [Windows(trigger) for trigger in program.triggers]
        tokens = [number % 7 for number in range(16_000)]
        started = time.process_time()
        for start in range(0, 16_000, 16):
            for each in windows:
                each.extend(tokens[start : start + 16])
            block_key(wire, windows, start, start + 16)
        assert (time.process_time() - started) / 1000 < microseconds * 1e-6


def test_a_schedule_whose_start_is_hidden_is_named_by_it() -> None:
    """From the end of the prompt it begins elsewhere in a longer one, which an exception may hide."""
    tokens = [0] * 24
    tokens[2], tokens[12] = 7, 8
    scope = {"start": -8, "except": {"after": 7, "until": 8}}
    raw = one(scope=scope, schedule={"kind": "linear", "over": 64, "to": 0.0})
    short, longer = keys_of(raw, 12, tokens), keys_of(raw, 14, tokens)
    assert keys_of(one(scope=scope), 12, tokens)[3:] == keys_of(one(scope=scope), 14, tokens)[3:]
    assert short[3] is not None
    assert short[3] != longer[3]
