"""One edit, its scope, its digest, and the canonical order of several."""

from __future__ import annotations

import json
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from itertools import groupby, permutations
from math import fsum
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from steer_engine.edit import (
    ALL,
    GENERATION,
    NO_END,
    PROMPT,
    Bound,
    Edit,
    GateBounds,
    Scope,
    canonical_order,
    sha256_of,
)
from steer_engine.spec import Op

V, W = "sha256:" + "1" * 64, "sha256:" + "2" * 64
PROMPT_LENS = (1, 2, 3, 7, 16, 100)


def add(scale: float = 1.0, vector: str = V, blocks: tuple[int, ...] = (3,), **fields: Any) -> Edit:
    return Edit(op=Op.ADD, vector=vector, blocks=blocks, scales=(scale,) * len(blocks), **fields)


def ablate(scale: float = 1.0, vector: str = V, **fields: Any) -> Edit:
    return Edit(op=Op.ABLATE, vector=vector, blocks=(3,), scales=(scale,), **fields)


GATE = GateBounds(vector=W, bounds=((0.1, 2.0),))

# Scopes


@pytest.mark.parametrize("prompt_len", PROMPT_LENS)
def test_spans_are_python_slices_of_the_prompt(prompt_len: int) -> None:
    ends = [None, *range(-prompt_len - 3, prompt_len + 4), -(2**30), 2**30]
    positions = list(range(prompt_len))
    for start in ends:
        for end in ends:
            first, stop = Scope.span(start, end).at(prompt_len)
            assert [p for p in positions if first <= p < stop] == positions[start:end], (start, end)


@pytest.mark.parametrize("prompt_len", PROMPT_LENS)
def test_named_scopes(prompt_len: int) -> None:
    assert ALL.at(prompt_len) == (0, NO_END)
    assert PROMPT.at(prompt_len) == (0, prompt_len)
    assert GENERATION.at(prompt_len) == (prompt_len - 1, NO_END)


def test_open_and_absolute_ends_reach_into_the_generation() -> None:
    assert Scope.span(-3, None).at(10) == (7, NO_END)
    assert Scope.span(8, 14).at(10) == (8, 14)
    assert Scope.span(-3, 14).at(10) == (7, 14)
    assert Scope.span(2, -3).at(10) == (2, 7)


def test_scopes_that_say_the_same_are_equal() -> None:
    assert Scope.span(None, None) == Scope.span(0, None) == ALL
    assert Scope.span(-1, None) == GENERATION
    assert Scope.span(None, 0) != PROMPT


@given(st.none() | st.integers(-(2**30), 2**30), st.none() | st.integers(-(2**30), 2**30), st.integers(0, 2**31))
@example(-1, None, 2**31 + 5)
@example(None, -1, 2**31 + 5)
def test_positions_fit_the_device(start: int | None, end: int | None, prompt_len: int) -> None:
    first, stop = Scope.span(start, end).at(prompt_len)
    assert 0 <= first <= NO_END
    assert 0 <= stop <= NO_END


@given(st.none() | st.integers(-20, 20), st.none() | st.integers(-20, 20))
def test_empty_scopes_are_those_that_no_prompt_fills(start: int | None, end: int | None) -> None:
    scope = Scope.span(start, end)
    filled = [prompt_len for prompt_len in range(60) if scope.at(prompt_len)[0] < scope.at(prompt_len)[1]]
    assert scope.is_empty == (not filled)


def test_a_bound_never_goes_below_the_first_token() -> None:
    assert Bound(True, -5).at(3) == 0
    assert Bound(True, -5).at(8) == 3


# Digests


def test_digests_are_these_for_ever() -> None:
    """Golden: they name steering in caches, logs and answers of other processes and versions."""
    edit = Edit(op=Op.CLAMP, vector=V, blocks=(3, 4), scales=(1.0, 1.0), lo=-0.5, hi=2.0, gate=GATE)
    assert edit.digest == "sha256:8a8520eecdc8168f28bdb98b81a928367e686780f44ca294c35b6a31e5020f33"
    assert add(0.1).digest == "sha256:2870bf973014a684f388379c76b642ad98acee8e81b6fcee81d327352e16df9e"
    text = '["steer-engine/edit/1","add","' + V + '",[3],[0.1],null,null,null]'
    assert sha256_of(json.loads(text)) == add(0.1).digest


def test_a_digest_is_the_same_in_another_process() -> None:
    code = (
        "from steer_engine.edit import Edit; from steer_engine.spec import Op;"
        f"print(Edit(op=Op.ADD, vector={V!r}, blocks=(3,), scales=(0.1,)).digest)"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == add(0.1).digest


def test_a_digest_depends_on_all_that_changes_the_output_but_the_positions() -> None:
    whole = Edit(op=Op.CLAMP, vector=V, blocks=(3, 4), scales=(1.0, 0.5), lo=-1.0, hi=2.0, gate=GATE)
    changed = [
        replace(whole, op=Op.SET),
        replace(whole, vector=W),
        replace(whole, blocks=(3, 5)),
        replace(whole, blocks=(3,), scales=(1.0,)),
        replace(whole, scales=(0.5, 1.0)),
        replace(whole, scales=(1.0, -0.5)),
        replace(whole, lo=-1.5),
        replace(whole, lo=None),
        replace(whole, hi=2.5),
        replace(whole, lo=2.0, hi=-1.0),
        replace(whole, gate=None),
        replace(whole, gate=replace(GATE, vector=V)),
        replace(whole, gate=replace(GATE, bounds=((0.2, 2.0),))),
        replace(whole, gate=replace(GATE, bounds=((0.1, 0.9),))),
    ]
    assert len({edit.digest for edit in [whole, *changed]}) == 1 + len(changed)
    assert replace(whole, scope=GENERATION).digest == whole.digest


def test_only_plain_numbers_are_digested() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        sha256_of([float("nan")])
    assert sha256_of([1, True]) != sha256_of([True, 1])


# What does nothing


@pytest.mark.parametrize(
    ("edit", "nothing"),
    [
        (add(0.0), True),
        (add(-0.0), True),
        (add(0.0, gate=GATE), True),
        (ablate(0.0), True),
        (replace(ablate(0.0), op=Op.ADD_RELATIVE), True),
        (replace(ablate(0.0), op=Op.CLAMP, lo=0.0), False),
        (replace(ablate(0.0), op=Op.SET, lo=0.0, hi=0.0), False),
        (add(1e-300), False),
        (add(1.0, scope=Scope.span(5, 5)), True),
        (replace(ablate(1.0), op=Op.SET, lo=0.0, hi=0.0, scope=Scope.span(-1, -3)), True),
        (add(1.0, scope=Scope.span(5, -5)), False),
    ],
)
def test_edits_that_do_nothing(edit: Edit, nothing: bool) -> None:
    assert edit.does_nothing is nothing
    assert canonical_order([edit]) == (() if nothing else (edit,))


# Canonical order


def test_adds_commute() -> None:
    adds = [add(1.0), add(2.0, W), add(0.5, scope=GENERATION), add(3.0, W, (1, 2))]
    orders = {canonical_order(order) for order in permutations(adds)}
    assert len(orders) == 1
    assert len(orders.pop()) == 3, "w at blocks 1, 2 and w at block 3 are one add"


def test_adds_of_one_vector_sum() -> None:
    assert canonical_order([add(1.0), add(2.0)]) == (add(3.0),)
    assert canonical_order([add(1.0), add(2.0, W), add(2.0)]) == canonical_order([add(2.0, W), add(3.0)])


def test_opposite_adds_vanish() -> None:
    assert canonical_order([add(20.0), add(-20.0)]) == ()
    assert canonical_order([add(20.0), add(1.0, W), add(-20.0)]) == (add(1.0, W),)


def test_adds_vanish_block_by_block() -> None:
    assert canonical_order([add(2.0, blocks=(3, 4)), add(-2.0, blocks=(4,))]) == (add(2.0, blocks=(3,)),)


def test_splitting_an_add_by_blocks_changes_nothing() -> None:
    whole = add(2.0, blocks=(1, 2, 3))
    assert canonical_order([add(2.0, blocks=(2,)), add(2.0, blocks=(1, 3))]) == (whole,)


def test_the_order_of_summands_does_not_show() -> None:
    parts = [add(scale) for scale in (0.1, 0.2, 0.3, 1e17, -1e17)]
    assert {canonical_order(order) for order in permutations(parts)} == {(add(fsum([0.1, 0.2, 0.3])),)}


def test_adds_of_other_scopes_are_kept_apart() -> None:
    edits = [add(1.0), add(1.0, scope=PROMPT), add(1.0, scope=GENERATION)]
    assert len(canonical_order(edits)) == 3


def test_what_does_not_commute_keeps_its_order() -> None:
    edits = (ablate(1.0), ablate(1.0, W), add(1.0, gate=GATE), ablate(0.5))
    assert canonical_order(edits) == edits
    assert canonical_order(edits[::-1]) == edits[::-1]


def test_gated_adds_do_not_merge() -> None:
    gated = add(1.0, gate=GATE)
    assert canonical_order([gated, gated]) == (gated, gated)
    assert canonical_order([add(1.0), gated, add(-1.0)]) == (add(1.0), gated, add(-1.0))


def test_adds_do_not_pass_what_does_not_commute() -> None:
    edits = (add(1.0), ablate(1.0), add(-1.0))
    assert canonical_order(edits) == edits


@pytest.mark.parametrize("nothing", [ablate(0.0), add(0.0, gate=GATE), add(0.0), ablate(1.0, scope=Scope.span(4, 2))])
def test_what_does_nothing_does_not_stand_between(nothing: Edit) -> None:
    assert canonical_order([add(1.0), nothing, add(2.0)]) == (add(3.0),)
    assert canonical_order([add(1.0), nothing, add(-1.0)]) == ()


SCOPES = [ALL, PROMPT, GENERATION, Scope.span(2, 5), Scope.span(-4, None), Scope.span(5, 2)]
BLOCKS = st.sampled_from([(0,), (1,), (0, 1), (1, 2)])
SCALES = st.sampled_from([-1.0, 0.0, 0.1, 0.2, 1.0])


@st.composite
def any_edits(draw: st.DrawFn) -> Edit:
    blocks = draw(BLOCKS)
    op = draw(st.sampled_from([Op.ADD, Op.ADD, Op.ADD, Op.ABLATE, Op.ADD_RELATIVE, Op.SET]))
    return Edit(
        op=op,
        vector=draw(st.sampled_from([V, W])),
        blocks=blocks,
        scales=(draw(SCALES),) * len(blocks) if op is not Op.SET else (1.0,) * len(blocks),
        scope=draw(st.sampled_from(SCOPES)),
        lo=0.5 if op is Op.SET else None,
        hi=0.5 if op is Op.SET else None,
        gate=draw(st.sampled_from([None, None, None, GATE])),
    )


def added(edits: Any) -> Counter[tuple[str, Scope, int]]:
    """(vector, scope, block) -> scale, of edits that all commute; what is zero is left out."""
    terms: dict[tuple[str, Scope, int], list[float]] = {}
    for edit in edits:
        for block, scale in zip(edit.blocks, edit.scales, strict=True):
            if not edit.scope.is_empty:
                terms.setdefault((edit.vector, edit.scope, block), []).append(scale)
    return Counter({key: total for key, scales in terms.items() if (total := fsum(scales))})  # type: ignore[misc]


@settings(max_examples=150)
@given(st.lists(any_edits(), max_size=7), st.randoms(use_true_random=False))
def test_canonical_order_of_any_edits(edits: list[Edit], random: Any) -> None:
    result = canonical_order(edits)
    assert canonical_order(result) == result
    # Shuffling within the runs of adds, once what does nothing is gone, makes no difference; the rest keeps its order.
    runs = [list(run) for _, run in groupby((e for e in edits if not e.does_nothing), key=lambda edit: edit.commutes)]
    for run in runs:
        if run[0].commutes:
            random.shuffle(run)
    assert canonical_order([edit for run in runs for edit in run]) == result
    assert [e for e in result if not e.commutes] == [e for e in edits if not e.commutes and not e.does_nothing]
    expected = [added(run) if run[0].commutes else run for run in runs]
    found = [list(run) for _, run in groupby(result, key=lambda edit: edit.commutes)]
    # Runs of adds that cancel are gone, and their neighbours meet.
    joined: list[Any] = []
    for run in expected:
        if isinstance(run, list) and joined and isinstance(joined[-1], list):
            joined[-1] = joined[-1] + run
        elif run:
            joined.append(run)
    assert [added(run) if run[0].commutes else run for run in found] == joined
    for run in found:
        if run[0].commutes:
            assert len({(edit.vector, edit.scope) for edit in run}) == len(run)
            assert not any(scale == 0 for edit in run for scale in edit.scales)
            assert all(list(edit.blocks) == sorted(set(edit.blocks)) for edit in run)
