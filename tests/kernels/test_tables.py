"""The byte format of an entry, and newly allocated tables."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steer_kernels.tables import MAX_POSITION, NUM_WORDS, Entry, Tables, decode_entry, encode_entry

int32s = st.integers(-(2**31), 2**31 - 1)
floats = st.floats(width=32, allow_nan=False)


def test_bytes_of_an_entry() -> None:
    entry = Entry(7, 1, 2, 0.5, -1.0, 2.0, 3.0, -4.0, 5.0, 6, -0.25, 0.75)
    words_W = encode_entry(entry)
    assert words_W.dtype == np.int32
    assert words_W.shape == (NUM_WORDS,)
    assert words_W.tolist() == [
        *(7, 1, 2, 0x3F000000, -0x40800000, 0x40000000, 0x40400000, -0x3F800000, 0x40A00000),
        *(6, -0x41800000, 0x3F400000, 0, 0, 0, 0),
    ]


def test_an_add_uses_only_the_first_16_bytes() -> None:
    plain, scaled = encode_entry(Entry(row=3)), encode_entry(Entry(row=3, start=4, end=9, c0=2.5))
    assert (plain != scaled).nonzero()[0].tolist() == [1, 2, 3]


def test_defaults_are_an_open_span_and_no_gate() -> None:
    entry = decode_entry(encode_entry(Entry(row=3)))
    assert (entry.start, entry.end) == (0, MAX_POSITION)
    assert (entry.gate_row, entry.min_cos, entry.max_cos) == (-1, -np.inf, np.inf)


@given(st.builds(Entry, *[int32s] * 3, *[floats] * 6, int32s, floats, floats))
def test_decode_inverts_encode(entry: Entry) -> None:
    assert decode_entry(encode_entry(entry)) == entry


@given(st.lists(int32s, min_size=12, max_size=12))
def test_decode_accepts_any_words(words: list[int]) -> None:
    decode_entry(np.array(words + [0] * 4, dtype=np.int32))


@pytest.mark.parametrize("entry", [Entry(row=2**31), Entry(row=0, end=2**31), Entry(row=0, c0=1e39)])
def test_numbers_that_do_not_fit_are_refused(entry: Entry) -> None:
    with pytest.raises((struct.error, OverflowError)):
        encode_entry(entry)


def test_allocated_tables_steer_and_capture_nothing() -> None:
    tables = Tables.allocate(
        num_slots=3, num_sites=2, num_entries=4, num_rows=5, hidden_size=8, max_tokens=7, bank_dtype=torch.bfloat16
    )
    assert tables.bank_RD.shape == (5, 8)
    assert tables.bank_RD.dtype == torch.bfloat16
    assert tables.entries_SLEW.shape == (3, 2, 4, NUM_WORDS)
    assert tables.capture_T is None
    assert tables.captured_LCD is None
    for name in ("bank_RD", "entries_SLEW", "counts_SL", "keep_norm_S", "span_S2", "slot_T", "pos_T"):
        assert not getattr(tables, name).any()
