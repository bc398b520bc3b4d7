"""Programs compute what was requested, and travel without loss."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import pytest
from helpers.random_specs import (
    HIDDEN_SIZE,
    NUM_BLOCKS,
    VECTORS,
    as_compiled,
    as_written,
    entries_at,
    resolved,
    specs,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from steer_engine.capture import CaptureRequest
from steer_engine.edit import NO_END
from steer_engine.parse import parse_spec
from steer_engine.program import LARGEST, Covered, Entry, Program, RowKey
from steer_engine.resolve import ResolvedSpec
from steer_engine.spec import Op
from steer_engine.template import ProgramTemplate

A, B = VECTORS["a"].digest, VECTORS["b"].digest
U64 = 2.0**-53
PROMPT_LEN = 6
prompt_lens = st.integers(1, 12)


def requested(*edits: dict[str, Any], **rest: Any) -> ResolvedSpec:
    return resolved({"edits": [{"vector": "a", **edit} for edit in edits], **rest})


def program(*edits: dict[str, Any], prompt_len: int = PROMPT_LEN, **rest: Any) -> Program:
    return requested(*edits, **rest).template.at(prompt_len)


def rows(seed: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Block, position and a row, over all blocks and from the first position to beyond any prompt."""
    rng = np.random.default_rng(seed)
    for block in range(NUM_BLOCKS):
        for position in (*range(14), 2**30 - 1):
            yield block, position, rng.normal(size=HIDDEN_SIZE)


# The same as requested


@settings(max_examples=80, deadline=None)
@given(specs(ops=tuple(Op)), prompt_lens, st.integers(0, 2**16))
def test_a_program_computes_what_was_written(raw: dict[str, Any], prompt_len: int, seed: int) -> None:
    spec = parse_spec(raw)
    assert spec is not None
    compiled = resolved(raw).template.at(prompt_len)
    for block, position, x_D in rows(seed):
        written = as_written(spec, x_D, block, position, prompt_len)
        got_D, error = as_compiled(compiled, x_D, block, position, U64)
        assume(written.margin > 1e-4 and written.shortest > 1e-4)
        # Both computations round, the one as written in as many operations.
        assert np.linalg.norm(got_D - written.x_D) <= 4 * error
        computes_rows = any(edit.op in (Op.ROTATE, Op.LOW_RANK) for edit in spec.edits or ())
        assert error < (1e-4 if computes_rows else 1e-9) * (1 + np.linalg.norm(x_D) + np.linalg.norm(written.x_D))


@pytest.mark.parametrize(
    "edits",
    [
        [{"scale": 2.0}],
        [{"scale": 2.0}, {"vector": "b", "scale": -1.0}],
        [{"scale": 0.5, "unit": "residual"}],
        [{"op": "add_relative", "scale": -0.5}],
        [{"op": "ablate"}],
        [{"op": "clamp", "lo": 3.0}],
        [{"op": "clamp", "hi": -3.0}],
        [{"op": "set", "target": 5.0}],
        [{"scale": 1.0}, {"op": "ablate", "vector": "b"}, {"scale": 1.0}],
    ],
)
def test_every_operation_shows(edits: list[dict[str, Any]]) -> None:
    compiled = program(*edits)
    effects = [np.linalg.norm(as_compiled(compiled, x_D, b, p, U64)[0] - x_D) for b, p, x_D in rows(1)]
    assert np.mean(np.array(effects) > 0.1) > 0.7


# Entries and rows


def entry_at(compiled: Program, block: int = 1) -> Entry:
    (entry,) = entries_at(compiled, block)
    return entry


def test_coefficients_of_the_operations() -> None:
    whole, unit = RowKey(terms=((A, 1.0),)), RowKey(terms=((A, 1.0),), unit=True)
    everywhere = {"start": 0, "end": NO_END}
    assert entry_at(program({"scale": 2.0})) == Entry(row=whole, c0=2.0, **everywhere)
    assert entry_at(program({"scale": 2.0, "op": "add_relative"})) == Entry(row=unit, c1=2.0, **everywhere)
    assert entry_at(program({"scale": 2.0, "op": "ablate"})) == Entry(row=unit, c2=-2.0, **everywhere)
    assert entry_at(program({"op": "clamp", "lo": -1})) == Entry(row=unit, c3=1.0, lo=-1.0, hi=LARGEST, **everywhere)
    assert entry_at(program({"op": "clamp", "hi": 1})) == Entry(row=unit, c3=1.0, lo=-LARGEST, hi=1.0, **everywhere)
    assert entry_at(program({"op": "set", "target": 3})) == Entry(row=unit, c3=1.0, lo=3.0, hi=3.0, **everywhere)


def test_a_gate_is_a_unit_row_with_bounds() -> None:
    entry = entry_at(program({"gate": {"vector": "c", "min_cos": 0.25, "max_cos": 0.5}}))
    assert entry.gate == (RowKey(terms=((VECTORS["c"].digest, 1.0),), unit=True), 0.25, 0.5)
    assert program({"gate": {"vector": "c", "min_cos": 0.25}}).vectors == tuple(sorted([A, VECTORS["c"].digest]))


def test_adds_of_equal_scope_are_one_row() -> None:
    compiled = program({"scale": 0.5}, {"vector": "b", "scale": 2}, {"vector": "b", "scale": 1})
    terms = tuple(sorted([(A, 0.5), (B, 3.0)]))
    assert entry_at(compiled, 1) == Entry(row=RowKey(terms=terms), c0=1.0, end=NO_END)
    assert entry_at(compiled, 0) == Entry(row=RowKey(terms=((A, 1.0),)), c0=0.5, end=NO_END), "b has no block 0"


def test_one_vector_shares_its_row_at_all_scales() -> None:
    scales = (0.5, -3.0, 7.0)
    compiled = [entry_at(program({"scale": scale})) for scale in scales]
    assert {entry.row for entry in compiled} == {RowKey(terms=((A, 1.0),))}
    assert [entry.c0 for entry in compiled] == list(scales)
    two_scopes = requested({"scale": 0.5, "scope": "prompt"}, {"scale": 2, "scope": "generation"})
    assert len({entry.row for entry in entries_at(two_scopes.template.at(3), 0)}) == 1


def test_blocks_of_equal_entries_are_grouped() -> None:
    compiled = program({"blocks": [0, 1, 3]}, {"vector": "d", "scale": 2})
    assert [group.blocks for group in compiled.sites] == [(0, 1, 3), (2,)]
    covered = [block for group in program({}, {"vector": "b"}).sites for block in group.blocks]
    assert sorted(covered) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("edits", "needed"),
    [
        ([{"scale": 0}], 0),
        ([{}], 1),
        ([{}, {"vector": "b"}, {"vector": "c"}], 1),
        ([{}, {"vector": "b", "scope": "prompt"}], 2),
        ([{"scope": "generation"}, {"scope": "prompt"}], 2),
        ([{}, {"op": "ablate"}], 2),
        ([{"op": "ablate"}, {"op": "ablate", "vector": "b"}, {"op": "set", "target": 1}], 3),
        ([{"gate": {"vector": "c", "min_cos": 0}}], 2),
        ([{"op": "ablate", "gate": {"vector": "a", "min_cos": 0}}], 1),
        ([{"op": "ablate", "gate": {"vector": "c", "min_cos": 0}}, {"op": "set", "vector": "c", "target": 1}], 2),
        ([{"blocks": 0}, {"blocks": 1, "scope": "prompt"}, {"blocks": 2, "op": "ablate"}], 1),
    ],
)
def test_rows_that_a_block_needs(edits: list[dict[str, Any]], needed: int) -> None:
    assert requested(*edits).template.rows == needed


@settings(max_examples=60, deadline=None)
@given(specs(ops=tuple(Op)), prompt_lens)
def test_no_block_needs_more_than_was_counted(raw: dict[str, Any], prompt_len: int) -> None:
    template = resolved(raw).template
    compiled = template.at(prompt_len)
    for group in compiled.sites:
        distinct = {entry.row for entry in group.entries} | {entry.gate[0] for entry in group.entries if entry.gate}
        distinct |= {entry.read for entry in group.entries if entry.read}
        assert 0 < len(group.entries) <= template.rows
        assert len(distinct) <= template.rows
        assert all(0 <= entry.start < entry.end <= NO_END for entry in group.entries)
    covered = [block for group in compiled.sites for block in group.blocks]
    assert len(covered) == len(set(covered))
    named = {term[0] for group in compiled.sites for entry in group.entries for term in entry.row.terms}
    assert named <= set(compiled.vectors)


# Positions


@pytest.mark.parametrize("prompt_len", [1, 2, 5, 100])
def test_scopes_become_positions(prompt_len: int) -> None:
    def span(scope: Any) -> tuple[int, int]:
        entry = entry_at(program({"scope": scope}, prompt_len=prompt_len))
        return entry.start, entry.end

    assert span("all") == (0, NO_END)
    assert span("prompt") == (0, prompt_len)
    assert span("generation") == (prompt_len - 1, NO_END)
    assert span({"start": -2}) == (max(0, prompt_len - 2), NO_END)
    assert span({"start": 0, "end": 2**30}) == (0, 2**30)


def test_what_covers_no_position_vanishes() -> None:
    spec = requested({"scope": {"end": -5}}, {"op": "ablate", "scope": {"start": 4, "end": -1}})
    assert spec.template.at(5) == Program()
    assert len(spec.template.at(6).sites[0].entries) == 2
    only_first = spec.template.at(5 + 1)
    assert only_first.vectors == (A,)
    (entry,) = entries_at(program({"scope": {"end": -5}}, {"op": "ablate", "scope": "all"}, prompt_len=5), 0)
    assert entry.c2 == -1.0


def test_identity_lists_edits_with_positions_in_canonical_order() -> None:
    spec = requested({"scope": "generation", "scale": 2}, {"op": "ablate", "scope": "prompt"})
    assert spec.template.at(9).identity == (
        Covered(spec.edits[0].edit.digest, 8, NO_END),
        Covered(spec.edits[1].edit.digest, 0, 9),
    )
    swapped = requested({"op": "ablate", "scope": "prompt"}, {"scope": "generation", "scale": 2})
    assert swapped.template.at(9).identity == spec.template.at(9).identity[::-1]


# The wire


@settings(max_examples=80, deadline=None)
@given(specs(ops=tuple(Op)), prompt_lens, st.booleans())
def test_the_wire_brings_a_program_back(raw: dict[str, Any], prompt_len: int, captures: bool) -> None:
    compiled = resolved(raw).template.at(prompt_len)
    if captures:
        compiled = replace(compiled, capture=CaptureRequest(key="k", positions=range(prompt_len), points=(0, 2)))
    wire = compiled.to_wire()
    assert_plain(wire)
    assert Program.from_wire(wire) == compiled
    assert Program.from_wire(json.loads(json.dumps(wire, allow_nan=False))) == compiled
    assert Program.from_wire(msgspec.msgpack.decode(msgspec.msgpack.encode(wire))) == compiled
    assert Program.from_wire(wire).to_wire() == wire


def assert_plain(value: Any) -> None:
    if isinstance(value, dict | list):
        assert type(value) in (dict, list)
        for inner in value.values() if isinstance(value, dict) else value:
            assert_plain(inner)
        return
    assert type(value) in (int, float, str, bool, type(None))
    if type(value) is int:
        assert -(2**31) <= value < 2**31
    if type(value) is float:
        assert abs(value) <= LARGEST


def test_an_empty_program_travels_too() -> None:
    assert Program.from_wire(Program().to_wire()) == Program()
    capture = Program(capture=CaptureRequest(key="k", positions=range(2, 5), points=(1,)))
    assert Program.from_wire(capture.to_wire()) == capture
    capture = Program(capture=CaptureRequest(key="k", positions=range(2, 5), points=(1,), scope="all"))
    assert Program.from_wire(capture.to_wire()) == capture


def test_a_wire_is_this() -> None:
    """Golden: processes of one engine must agree."""
    compiled = program({"scale": 2.0, "op": "ablate", "blocks": 1, "scope": {"start": 1, "end": 3}}, preserve_norm=True)
    assert compiled.to_wire() == {
        "sites": [[[1], [[[[[A, 1.0]], True], [0.0, 0.0, -2.0, 0.0, -LARGEST, LARGEST], 1, 3, None]]]],
        "vectors": [A],
        "identity": [[compiled.identity[0].edit, 1, 3]],
        "keep_norm": True,
    }


def test_templates_are_small() -> None:
    """A program holds numbers per group of equal blocks, not per block: what the engine core is sent stays small."""
    wire = program({"scale": 0.25}, {"vector": "b", "op": "ablate", "scope": "generation"}).to_wire()
    assert len(msgspec.msgpack.encode(wire)) < 1500


def test_a_template_of_nothing() -> None:
    template = ProgramTemplate.compile([])
    assert template.rows == 0
    assert template.at(5) == Program()
