"""Quiet decoding steps leave the windows and the history that the plain rule leaves, and loud ones are not taken."""

from __future__ import annotations

import copy

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from steer_kernels.tables import MAX_POSITION, Tables, encode_trigger
from steer_kernels.trigger_windows import QuietDecoding, advance_triggers_reference

NUM_SLOTS = 4
sequences = st.lists(st.integers(0, 3), max_size=2)
triggers = st.tuples(sequences, sequences, st.booleans(), st.sampled_from([1, 3, MAX_POSITION]))
"""after, until, each, length"""


def tables_of(slots: list[list[tuple[list[int], list[int], bool, int]]]) -> Tables:
    tables = Tables.allocate(
        num_slots=NUM_SLOTS + 1, num_sites=1, num_entries=1, num_rows=1, hidden_size=1, max_tokens=8,
        bank_dtype=torch.float32,
    )  # fmt: skip
    tables.history_SHC.fill_(-1)
    tables.history_SHC[:, -1, 1:] = -2
    for slot, given_triggers in enumerate(slots, start=1):
        tables.num_triggers_S[slot] = len(given_triggers)
        for j, (after, until, each, length) in enumerate(given_triggers):
            words = encode_trigger(after, until, each=each, length=length)
            tables.triggers_SJP[slot, j] = torch.from_numpy(words)
            if not after:
                tables.history_SHC[slot, -1, 1 + j] = -1
    return tables


@settings(max_examples=60, deadline=None)
@given(
    slots=st.lists(st.lists(triggers, max_size=3), min_size=NUM_SLOTS, max_size=NUM_SLOTS),
    seed=st.integers(0, 2**32 - 1),
)
def test_as_the_rule_says(slots: list[list[tuple[list[int], list[int], bool, int]]], seed: int) -> None:
    rng = np.random.default_rng(seed)
    quick, plain = tables_of(slots), tables_of(slots)
    starts = torch.arange(NUM_SLOTS + 1, dtype=torch.int32)
    mapping = torch.arange(NUM_SLOTS, dtype=torch.int32)
    quiet: QuietDecoding | None = None
    for position in range(30):
        # Rare tokens, so that most steps are quiet.
        tokens = torch.from_numpy(np.where(rng.random(NUM_SLOTS) < 0.15, rng.integers(0, 4, NUM_SLOTS), 9))
        step = (starts, mapping, torch.full((NUM_SLOTS,), position), tokens.to(torch.int32))
        advance_triggers_reference(*step, plain)
        before = copy.deepcopy(quick)
        if quiet is None or not quiet.advance(*step, quick):
            assert torch.equal(quick.history_SHC, before.history_SHC), "a refused step writes nothing"
            advance_triggers_reference(*step, quick)
            quiet = QuietDecoding(*step[:3], quick)
        else:
            TAKEN.append(position)
        for slot, given_triggers in enumerate(slots, start=1):
            used = slice(0, len(given_triggers))
            assert torch.equal(quick.windows_TJ[slot - 1, used], plain.windows_TJ[slot - 1, used])
            if given_triggers:
                assert torch.equal(quick.history_SHC[slot, position % 9, 0], plain.history_SHC[slot, position % 9, 0])


TAKEN: list[int] = []


def test_most_steps_were_quiet() -> None:
    assert len(TAKEN) > 300


def test_another_batch_or_another_position_is_not_quiet() -> None:
    tables = tables_of([[([1], [2], True, MAX_POSITION)]] * NUM_SLOTS)
    starts = torch.arange(NUM_SLOTS + 1, dtype=torch.int32)
    mapping = torch.arange(NUM_SLOTS, dtype=torch.int32)
    first = (starts, mapping, torch.full((NUM_SLOTS,), 5))
    token = torch.full((NUM_SLOTS,), 9, dtype=torch.int32)
    advance_triggers_reference(*first, token, tables)
    after = torch.full((NUM_SLOTS,), 6)
    for step in [
        (starts, mapping.flip(0), after),
        (starts[:-1], mapping[:-1], after[:-1]),
        (starts, mapping, torch.full((NUM_SLOTS,), 7)),
        (starts, mapping, torch.full((NUM_SLOTS,), 5)),
    ]:
        assert not QuietDecoding(*first, tables).advance(*step, token[: len(step[1])], tables)
    assert QuietDecoding(*first, tables).advance(starts, mapping, after, token, tables)
