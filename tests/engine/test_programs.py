"""Programs in their slots: written whole, cleared, and computing on real tables what the client wrote.

Legend: see `steer_kernels.tables`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from helpers.random_specs import (
    BY_DIGEST,
    HIDDEN_SIZE,
    MODEL,
    NUM_BLOCKS,
    ROW_SETS,
    as_compiled,
    as_written,
    entries_at,
    resolved,
    row_of,
    source,
    specs,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from steer_kernels.reference import edit_residual_reference, route_rows_reference
from steer_kernels.tables import Tables, decode_entry

from steer_engine.engine.bank import Bank, Store
from steer_engine.engine.programs import Programs
from steer_engine.monitor import Watched
from steer_engine.parse import parse_spec
from steer_engine.program import Entry as ProgramEntry
from steer_engine.program import Program, RowKey, Sites
from steer_engine.spec import Op

U32 = 2.0**-24
NUM_REQUESTS = 3
NUM_ENTRIES = MODEL.rows
MAX_TOKENS = 64
PROMPT_LEN = 6


class Engine:
    """Real tables with a real bank and store, and room for NUM_REQUESTS."""

    def __init__(self, armed_blocks: tuple[int, ...] = MODEL.armed_blocks, elsewhere: tuple[int, ...] = ()) -> None:
        self.armed_blocks = armed_blocks
        self.store = Store()
        for vector in BY_DIGEST.values():
            self.store.put(vector)
        self.tables = Tables.allocate(
            num_slots=NUM_REQUESTS + 1,
            num_sites=len(armed_blocks),
            num_entries=NUM_ENTRIES,
            num_rows=NUM_REQUESTS * len(armed_blocks) * NUM_ENTRIES,
            hidden_size=HIDDEN_SIZE,
            max_tokens=MAX_TOKENS,
            bank_dtype=torch.float32,
        )
        self.bank = Bank(self.tables.bank_RD, self.store.row)
        self.programs = Programs(self.tables, self.bank, armed_blocks, elsewhere)

    def assert_slot(self, slot: int, program: Program | None) -> None:
        """The slot holds `program` and not a number more; None: it holds nothing."""
        tables = self.tables
        groups = {} if program is None else {block: group for group in program.sites for block in group.blocks}
        entries = [entry for group in groups.values() for entry in group.entries]
        span = [min(entry.start for entry in entries), max(entry.end for entry in entries)] if entries else [0, 0]
        assert tables.span_S2[slot].tolist() == span
        for site, block in enumerate(self.armed_blocks):
            here = groups[block].entries if block in groups else ()
            assert int(tables.counts_SL[slot, site]) == len(here)
            for e, entry in enumerate(here):
                self._assert_entry(tables.entries_SLEW[slot, site, e], entry, block)
            if entries:
                assert not tables.entries_SLEW[slot, site, len(here) :].any()
        if program is not None and entries:
            assert int(tables.keep_norm_S[slot]) == int(program.keep_norm)

    def _assert_entry(self, words_W: torch.Tensor, entry: ProgramEntry, block: int) -> None:
        found = decode_entry(words_W.numpy())
        assert (found.start, found.end) == (entry.start, entry.end)
        numbers = (found.c0, found.c1, found.c2, found.c3, found.lo, found.hi)
        assert numbers == tuple(np.array(entry.coefficients, dtype=np.float32).tolist())
        self._assert_row(found.row, entry.row, block)
        if entry.gate is None:
            assert (found.gate_row, found.min_cos, found.max_cos) == (-1, -np.inf, np.inf)
        else:
            self._assert_row(found.gate_row, entry.gate[0], block)
            assert (found.min_cos, found.max_cos) == tuple(np.array(entry.gate[1:], dtype=np.float32).tolist())

    def _assert_row(self, number: int, key: RowKey, block: int) -> None:
        assert np.array_equal(self.tables.bank_RD[number].numpy(), row_of(key, block).astype(np.float32))


def program(*edits: dict[str, Any], prompt_len: int = PROMPT_LEN, **rest: Any) -> Program:
    return resolved({"edits": [{"vector": "a", **edit} for edit in edits], **rest}).template.at(prompt_len)


def test_an_admitted_program_is_in_its_slot() -> None:
    engine = Engine()
    admitted = program(
        {"scale": 0.3},
        {"vector": "b", "op": "clamp", "lo": -0.1, "scope": "generation", "gate": {"vector": "c", "min_cos": 0.1}},
        {"vector": "d", "op": "set", "target": 1 / 3, "scope": {"start": 2, "end": 9}},
        preserve_norm=True,
    )
    engine.programs.admit(2, admitted)
    engine.assert_slot(2, admitted)
    assert engine.programs.steered_slots == {2}
    for slot in (0, 1, 3):
        engine.assert_slot(slot, None)


def test_blocks_that_a_program_does_not_cover_stay_empty() -> None:
    engine = Engine()
    engine.programs.admit(1, program({"blocks": [1, 3]}))
    assert engine.tables.counts_SL[1].tolist() == [0, 1, 0, 1]
    assert not engine.tables.entries_SLEW[1, [0, 2]].any()


def test_sites_are_armed_blocks_in_order() -> None:
    engine = Engine(armed_blocks=(1, 3))
    admitted = program({"blocks": [3]}, {"blocks": [1], "op": "ablate"})
    engine.programs.admit(1, admitted)
    engine.assert_slot(1, admitted)
    assert decode_entry(engine.tables.entries_SLEW[1, 0, 0].numpy()).c2 == -1.0


def test_a_slot_keeps_nothing_of_its_predecessor() -> None:
    engine = Engine()
    first = program({}, {"op": "ablate", "scope": "prompt"}, {"vector": "b", "op": "ablate"}, preserve_norm=True)
    second = program({"blocks": 2, "scope": "generation"})
    for admitted in (first, second, first):
        engine.programs.admit(1, admitted)
        engine.assert_slot(1, admitted)
        engine.programs.release(1)
        engine.assert_slot(1, None)
    engine.programs.admit(1, Program())
    engine.assert_slot(1, None)


def test_empty_programs_leave_their_slot_unsteered() -> None:
    engine = Engine()
    engine.programs.admit(1, Program())
    engine.programs.admit(1, program({"scope": {"end": -PROMPT_LEN}}))
    assert engine.programs.steered_slots == set()
    engine.assert_slot(1, None)
    engine.programs.release(1)


def test_requests_with_nothing_but_monitors_are_not_steered() -> None:
    engine = Engine()
    watched = Watched(numbers=((resolved({"edits": [{"vector": "a"}]}).edits[0].edit.vector, 1, "cosine"),))
    engine.bank.pin(watched.rows)
    programs = [watched.added_to(None, PROMPT_LEN), watched.added_to(program({}), PROMPT_LEN)]
    for slot, admitted in enumerate(programs, start=1):
        engine.programs.admit(slot, admitted)
    assert engine.programs.steered_slots == engine.programs.probe_slots == {1, 2}
    assert engine.programs.num_steered == 1
    engine.programs.release(2)
    assert engine.programs.num_steered == 0
    engine.programs.release(1)
    assert engine.programs.watched_slots == set()
    assert engine.bank.num_pinned == 1, "the row of the monitor"


def test_releasing_is_idempotent_and_takes_slots_never_seen() -> None:
    engine = Engine()
    engine.programs.admit(1, program({}))
    for slot in (1, 1, 2, 0):
        engine.programs.release(slot)
    assert engine.bank.num_pinned == 0


def test_mistakes_of_ours_are_caught() -> None:
    engine = Engine()
    with pytest.raises(AssertionError, match="slot 0"):
        engine.programs.admit(0, program({}))
    engine.programs.admit(1, program({}))
    with pytest.raises(AssertionError, match="taken"):
        engine.programs.admit(1, program({}))


def test_a_program_that_cannot_be_written_changes_nothing() -> None:
    """The second vector is not stored, or the second block not armed: no row of the first may stay pinned."""
    held = program({}).sites[0].entries[0]
    absent = ProgramEntry(row=RowKey(terms=(("sha256:" + "0" * 64, 1.0),)), c0=1.0, end=5)
    too_large = ProgramEntry(row=held.row, c0=1e39, end=5)
    engine = Engine()
    for sites in (
        (Sites(blocks=(0,), entries=(held, absent)),),
        (Sites(blocks=(0,), entries=(held,)), Sites(blocks=(NUM_BLOCKS,), entries=(held,))),
        (Sites(blocks=(0,), entries=(held, too_large)),),
    ):
        with pytest.raises((KeyError, OverflowError)):
            engine.programs.admit(1, Program(sites=sites))
        assert engine.bank.num_pinned == 0
        assert engine.programs.steered_slots == set()
        engine.assert_slot(1, None)
    engine.programs.admit(1, program({}))
    engine.assert_slot(1, program({}))


def test_stages_share_a_program_between_them() -> None:
    """Each writes and pins what its own blocks need; a block that no stage has is a mistake of ours."""
    first, rest = MODEL.armed_blocks[:1], MODEL.armed_blocks[1:]
    stages = [Engine(first, rest), Engine(rest, first)]
    whole = program({"scale": 2.0})
    for stage in stages:
        stage.programs.admit(1, whole)
        assert stage.bank.num_pinned == len(stage.armed_blocks)
        assert stage.tables.counts_SL[1].tolist() == [1] * len(stage.armed_blocks)
    only_first = Program(sites=tuple(Sites(blocks=first, entries=site.entries) for site in whole.sites))
    for stage, steered in zip(stages, ({1, 2}, {1}), strict=True):
        stage.programs.admit(2, only_first)
        assert stage.programs.steered_slots == steered
        stage.programs.release(1)
        stage.programs.release(2)
        assert stage.bank.num_pinned == 0
        nobodys = Program(sites=tuple(Sites(blocks=(NUM_BLOCKS,), entries=site.entries) for site in whole.sites))
        with pytest.raises(KeyError):
            stage.programs.admit(1, nobodys)


def test_requests_share_rows_and_give_them_back() -> None:
    engine = Engine()
    engine.programs.admit(1, program({"scale": 1.0}))
    engine.programs.admit(2, program({"scale": -3.0, "scope": "generation"}))
    assert engine.bank.num_pinned == NUM_BLOCKS
    engine.programs.release(1)
    assert engine.bank.num_pinned == NUM_BLOCKS
    engine.programs.release(2)
    assert engine.bank.num_pinned == 0


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_admitting_and_releasing_in_any_order(data: st.DataObject) -> None:
    engine = Engine()
    running: dict[int, Program] = {}
    for _ in range(data.draw(st.integers(1, 8))):
        slot = data.draw(st.integers(1, NUM_REQUESTS))
        if slot in running:
            engine.programs.release(slot)
            del running[slot]
        else:
            spec = resolved(data.draw(specs(max_edits=3, ops=tuple(Op))))
            for vector in spec.vectors.values():
                engine.store.put(vector)
            running[slot] = spec.template.at(PROMPT_LEN)
            engine.programs.admit(slot, running[slot])
        for held in range(NUM_REQUESTS + 1):
            engine.assert_slot(held, running.get(held))
        assert engine.programs.steered_slots == {slot for slot, held in running.items() if held.sites}
    for slot in running:
        engine.programs.release(slot)
    assert engine.bank.num_pinned == 0
    assert not engine.tables.counts_SL.any()
    assert not engine.tables.span_S2.any()


# On real tables, as the client wrote it


def edited_batch(
    engine: Engine, counts: list[int], firsts: list[int], slots: list[int], seed: int, adds_only: bool
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor]]:
    """A step of requests with `counts` rows from positions `firsts`: hidden, carried, and carried after each site."""
    generator = torch.Generator().manual_seed(seed)
    num_tokens = sum(counts)
    hidden, carried = (torch.randn(num_tokens + 2, HIDDEN_SIZE, generator=generator) for _ in range(2))
    starts_B1 = torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32)
    mapping_B = torch.tensor([slot - 1 for slot in slots], dtype=torch.int32)
    positions_T = torch.cat([torch.arange(first, first + count) for first, count in zip(firsts, counts, strict=True)])
    route_rows_reference(starts_B1, mapping_B, positions_T, engine.tables, num_tokens)
    edited = []
    for site in range(len(engine.armed_blocks)):
        edited.append(carried.clone())
        edit_residual_reference(hidden, edited[-1], engine.tables, site, adds_only=adds_only)
    return hidden, carried, edited


@settings(max_examples=60, deadline=None)
@given(
    st.lists(specs(max_edits=4, ops=tuple(Op)), min_size=1, max_size=NUM_REQUESTS),
    st.lists(st.tuples(st.integers(1, 8), st.integers(0, 8)), min_size=NUM_REQUESTS + 1, max_size=NUM_REQUESTS + 1),
    st.integers(1, 9),
    st.integers(0, 2**16),
)
def test_tables_compute_what_was_written(
    raws: list[Any], chunks: list[tuple[int, int]], prompt_len: int, seed: int
) -> None:
    parsed = [parse_spec(raw) for raw in raws]
    compiled = [resolved(raw).template.at(prompt_len) for raw in raws]
    engine = Engine()
    for slot, admitted in enumerate(compiled, start=1):
        engine.programs.admit(slot, admitted)
    slots = [*range(1, len(raws) + 1), 0]
    counts, firsts = zip(*chunks[: len(slots)], strict=True)
    hidden, carried, edited = edited_batch(engine, list(counts), list(firsts), slots, seed, adds_only=False)
    row = 0
    for slot, count, first in zip(slots, counts, firsts, strict=True):
        for position in range(first, first + count):
            for block, after in enumerate(edited):
                if slot == 0:
                    assert torch.equal(after[row], carried[row])
                else:
                    spec = parsed[slot - 1]
                    assert spec is not None
                    x_D = (hidden[row].double() + carried[row].double()).numpy()
                    written = as_written(spec, x_D, block, position, prompt_len)
                    _, error = as_compiled(compiled[slot - 1], x_D, block, position, U32)
                    if written.margin < 100 * error or written.shortest < 100 * error:
                        continue  # within rounding of a gate's threshold either side is right
                    got_D = (hidden[row].double() + after[row].double()).numpy()
                    # The last rounding is that of the carried part alone.
                    error += U32 * float(np.linalg.norm(after[row].double()))
                    assert np.linalg.norm(got_D - written.x_D) <= error
                    if not any(e.start <= position < e.end for e in entries_at(compiled[slot - 1], block)):
                        assert torch.equal(after[row], carried[row])
            row += 1
    for after in edited:
        assert torch.equal(after[row:], carried[row:]), "padding is not edited"


@pytest.mark.parametrize(
    ("edits", "adds_only"),
    [
        ([{"scale": 1.0}], True),
        ([{"scale": 1.0}, {"vector": "c", "scale": -0.5, "scope": "generation"}], True),
        ([{"scale": 1.0}], False),
        ([{"op": "add_relative", "scale": 0.5}], False),
        ([{"op": "ablate"}], False),
        ([{"op": "set", "target": 4.0}], False),
        ([{"op": "clamp", "lo": 4.0}], False),
        ([{"scale": 1.0, "gate": {"vector": "c", "min_cos": -1.0}}], False),
    ],
)
def test_edits_are_far_above_their_bounds(edits: list[dict[str, Any]], adds_only: bool) -> None:
    engine = Engine()
    admitted = program(*edits, prompt_len=4)
    engine.programs.admit(1, admitted)
    hidden, carried, edited = edited_batch(engine, [8], [0], [1], 0, adds_only)
    for block, after in enumerate(edited):
        for position in range(8):
            x_D = (hidden[position].double() + carried[position].double()).numpy()
            want_D, error = as_compiled(admitted, x_D, block, position, U32)
            got_D = (hidden[position].double() + after[position].double()).numpy()
            error += U32 * float(np.linalg.norm(after[position].double()))
            assert np.linalg.norm(got_D - want_D) <= error
        effect = (after - carried)[:8].double().norm(dim=1).max()
        assert effect > 1000 * error


@pytest.mark.parametrize(("bound", "add"), [("min_dot", 3.0), ("max_dot", -3.0)])
def test_a_gate_opens_for_all_features_of_an_edit_or_for_none(bound: str, add: float) -> None:
    """Adding to a feature reads nothing of x, but its gate does: all of them test the x before the edit."""
    raw = {"vector": "relu", "op": "feature", "feature": [3, 7], "add": add, "gate": {"vector": "a", bound: 0.0}}
    spec, admitted = parse_spec({"edits": [raw]}), resolved({"edits": [raw]}).template.at(4)
    assert spec is not None
    engine = Engine()
    engine.programs.admit(1, admitted)
    hidden, carried, edited = edited_batch(engine, [32], [0], [1], 0, adds_only=False)
    gate_D = row_of(RowKey(terms=((source("a").digest, 1.0),)), 2)
    steps = [add * ROW_SETS["relu"].row(2, number).write.astype(np.float64) @ gate_D for number in (3, 7)]
    crossing = 0
    for position in range(32):
        x_D = (hidden[position].double() + carried[position].double()).numpy()
        written = as_written(spec, x_D, 2, position, 4)
        _, error = as_compiled(admitted, x_D, 2, position, U32)
        got_D = (hidden[position].double() + edited[2][position].double()).numpy()
        error += U32 * float(np.linalg.norm(edited[2][position].double()))
        assert written.margin > 100 * error
        assert np.linalg.norm(got_D - written.x_D) <= error
        number = float(x_D @ gate_D)
        is_open = number > 0 if bound == "min_dot" else number < 0
        crossing += is_open and (number + steps[0] > 0) != (number > 0)
    assert crossing > 0, "no row whose gate the first feature would close for the second"
