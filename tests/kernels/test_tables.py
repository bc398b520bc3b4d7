"""The byte format of an entry, and newly allocated tables."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from steer_kernels import tables as tb
from steer_kernels.tables import (
    ANY_TOKEN,
    MAX_POSITION,
    NO_TOKEN,
    NUM_WORDS,
    Entry,
    Tables,
    decode_entry,
    encode_entry,
    encode_trigger,
)

int32s = st.integers(-(2**31), 2**31 - 1)
positions = st.integers(0, MAX_POSITION)
floats = st.floats(width=32, allow_nan=False)
triggers = st.integers(-1, tb.MAX_TRIGGERS - 1)
details = st.fixed_dictionaries(
    {},
    optional={
        "trigger": triggers,
        "exclude": triggers,
        "conditions": st.integers(0, 2**tb.MAX_CONDITIONS - 1),
        "any_condition": st.booleans(),
        "over": positions,
        "slope": floats,
        "to": floats,
        "exponential": st.booleans(),
        "measure": st.sampled_from([0, tb.DOT, tb.COSINE]),
        "total": st.integers(0, tb.MAX_CONDITIONS - 1),
        "largest": st.booleans(),
        "gate_dot": st.booleans(),
    },
)
PLAIN = Entry(7, 1, 2, 0.5, -1.0, 2.0, 3.0, -4.0, 5.0, 6, -0.25, 0.75)


def test_bytes_of_an_entry() -> None:
    words_W = encode_entry(PLAIN)
    assert words_W.dtype == np.int32
    assert words_W.shape == (NUM_WORDS,)
    assert words_W.tolist() == [
        *(7, 1, 2, 0x3F000000, -0x40800000, 0x40000000, 0x40400000, -0x3F800000, 0x40A00000),
        *(6, -0x41800000, 0x3F400000, 0, 0, 0, 0),
    ]


def test_bytes_of_the_details() -> None:
    """The sign bit of START, then every bit field of WHEN at its place, and the schedule."""
    limited = PLAIN._replace(
        trigger=4, exclude=6, conditions=0b1000_0001, any_condition=True, over=9, slope=0.5, to=2.0
    )
    measuring = PLAIN._replace(exponential=True, measure=tb.COSINE, total=5, largest=True)
    plain_W, limited_W, measuring_W = map(encode_entry, (PLAIN, limited, measuring))
    for words_W in (limited_W, measuring_W):
        assert words_W[tb.START] == -(2**31) + 1
        assert (words_W[:12] != plain_W[:12]).nonzero()[0].tolist() == [tb.START]
    assert limited_W[12:].tolist() == [5 | 7 << 4 | 0b1000_0001 << 8 | 1 << 16, 9, 0x3F000000, 0x40000000]
    assert measuring_W[12:].tolist() == [1 << 17 | 2 << 18 | 5 << 20 | 1 << 23, 0, 0, 0]


def test_bytes_of_a_probe() -> None:
    """A probe has its column in place of the gate row."""
    for late in (False, True):
        words_W = encode_entry(Entry(row=7, start=1, end=2, measure=tb.DOT, probe=3, late=late))
        assert words_W[tb.START] == -(2**31) + 1
        assert words_W[tb.GATE_ROW] == 3
        assert words_W[12:].tolist() == [1 << 18 | 1 << 24 | late << 25, 0, 0, 0]


def test_bytes_of_a_mode() -> None:
    """The read row is in the word of c1; the entry stays as long as it was."""
    entry = PLAIN._replace(c1=0.0, mode=tb.JUMP, read_row=9, gate_dot=True, parallel=tb.LAST)
    words_W = encode_entry(entry)
    assert words_W.nbytes == 64
    assert words_W[tb.READ_ROW] == 9
    assert words_W[12:].tolist() == [2 << 26 | 1 << 28 | 2 << 29, 0, 0, 0]
    assert decode_entry(words_W) == entry


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (Entry(row=0, parallel=tb.LAST), "has a mode"),
        (Entry(row=0, mode=tb.READ, c1=1.0), "no c1"),
        (Entry(row=0, mode=4, read_row=1), "out of range"),
        (Entry(row=0, probe=0), "measures the dot product or the cosine"),
        (Entry(row=0, measure=tb.DOT, probe=0, gate_row=2), "has no gate"),
        (Entry(row=0, measure=tb.DOT, probe=-2), "out of range"),
        (Entry(row=0, measure=tb.DOT, late=True), "only a probe"),
    ],
)
def test_entries_that_cannot_be_are_refused(entry: Entry, match: str) -> None:
    with pytest.raises(AssertionError, match=match):
        encode_entry(entry)


def test_without_the_sign_bit_there_are_no_details() -> None:
    """As in the kernels, which do not load those words then."""
    words_W = encode_entry(PLAIN)
    words_W[tb.WHEN :] = -1
    assert decode_entry(words_W) == PLAIN


def test_bytes_of_a_trigger() -> None:
    """The sequences last token first, padded with what matches every token; an absent one matches nothing."""
    words_P = encode_trigger((5, 6, 7), (), each=True, length=40)
    assert words_P.dtype == np.int32
    assert words_P.tolist() == [1, 40, 7, 6, 5, *[ANY_TOKEN] * 5, NO_TOKEN, *[ANY_TOKEN] * 7]
    assert encode_trigger((), range(8), each=False, length=1).tolist() == [
        *(0, 1, NO_TOKEN, *[ANY_TOKEN] * 7),
        *reversed(range(8)),
    ]


def test_an_add_uses_only_the_first_16_bytes() -> None:
    plain, scaled = encode_entry(Entry(row=3)), encode_entry(Entry(row=3, start=4, end=9, c0=2.5))
    assert (plain != scaled).nonzero()[0].tolist() == [1, 2, 3]


def test_defaults_are_an_open_span_and_no_gate() -> None:
    entry = decode_entry(encode_entry(Entry(row=3)))
    assert (entry.start, entry.end) == (0, MAX_POSITION)
    assert (entry.gate_row, entry.min_cos, entry.max_cos) == (-1, -np.inf, np.inf)


@given(st.tuples(int32s, positions, int32s, *[floats] * 6, int32s, floats, floats), details)
def test_decode_inverts_encode(numbers: tuple[float, ...], details: dict[str, object]) -> None:
    entry = Entry(*numbers, **details)  # type: ignore[arg-type]
    assert decode_entry(encode_entry(entry)) == entry


@given(
    st.sampled_from([tb.READ, tb.JUMP, tb.PLANE]),
    int32s,
    st.sampled_from([0, tb.MEMBER, tb.LAST]),
    st.booleans(),
    floats,
)
def test_decode_inverts_encode_of_a_mode(mode: int, row: int, parallel: int, gate_dot: bool, number: float) -> None:
    entry = PLAIN._replace(c1=0.0, c3=number, mode=mode, read_row=row, parallel=parallel, gate_dot=gate_dot)
    assert decode_entry(encode_entry(entry)) == entry


@given(details, st.integers(0, 2**31 - 1), st.sampled_from([tb.DOT, tb.COSINE]), st.booleans())
def test_decode_inverts_encode_of_a_probe(details: dict[str, object], probe: int, measure: int, late: bool) -> None:
    entry = Entry(3, 4, 5, **{**details, "measure": measure, "probe": probe, "late": late})  # type: ignore[arg-type]
    assert decode_entry(encode_entry(entry)) == entry


@given(st.lists(int32s, min_size=NUM_WORDS, max_size=NUM_WORDS))
def test_decode_accepts_any_words(words: list[int]) -> None:
    decode_entry(np.array(words, dtype=np.int32))


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
    assert tables.captured_MCD is None
    assert tables.captured_at(0) is None
    assert tables.probed_TK is None
    assert tables.history_SHC.shape == (3, 9, 17)
    assert tables.bounds_SQ2.dtype == torch.float64
    for name in Tables.__dataclass_fields__:
        part = getattr(tables, name)
        assert part is None or part == {} or not part.any()


def test_allocated_tables_with_probes() -> None:
    tables = Tables.allocate(
        num_slots=3,
        num_sites=2,
        num_entries=4,
        num_rows=5,
        hidden_size=8,
        max_tokens=7,
        bank_dtype=torch.bfloat16,
        num_probes=2,
    )
    assert tables.probed_TK is not None
    assert tables.probed_TK.shape == (7, 2)
    assert tables.probed_TK.dtype == torch.float32


def test_only_the_named_sites_have_capture_rows() -> None:
    sizes = {"num_slots": 3, "num_sites": 9, "num_entries": 4, "num_rows": 5, "hidden_size": 8, "max_tokens": 7}
    tables = Tables.allocate(**sizes, bank_dtype=torch.bfloat16, capture_rows=7, capture_sites=(1, 5))
    assert tables.captured_MCD is not None
    assert tables.captured_MCD.shape == (2, 7, 8)
    for site in range(9):
        found_CD = tables.captured_at(site)
        assert (found_CD is not None) == (site in (1, 5))
        if found_CD is not None:
            found_CD.fill_(site)
    assert tables.captured_MCD[:, 0, 0].tolist() == [1, 5]
    everywhere = Tables.allocate(**sizes, bank_dtype=torch.bfloat16, capture_rows=7)
    assert everywhere.captured_MCD is not None
    assert len(everywhere.captured_MCD) == 9


def test_the_kernels_offsets_fit_the_tables() -> None:
    """`details`, `edit_residual` and `add_rms_norm_edit` step by 8 windows, 8 numbers and 16 bounds, and keep the
    numbers of 8 entries."""
    assert tb.MAX_TRIGGERS == 8
    assert tb.MAX_CONDITIONS == 8
    assert tb.MAX_PARALLEL == 8
    assert max(1 << bits for _, bits in (tb.TRIGGER, tb.EXCEPT)) > tb.MAX_TRIGGERS + 1
