"""Numbers of a row that need a sum over D: norms, dot products and cosines, for edits, conditions and probes.

Legend: see `tables`. All functions read the row as edited so far, x + delta, with delta a tuple of tiles (see `tiles`).
"""

# Triton kernels are untyped Python.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl

from steer_kernels.details import add_measured, share_of
from steer_kernels.tiles import load_stream_tile, load_tile


@triton.jit
def now_tile(hidden, carried, delta, i: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, HAS_HIDDEN: tl.constexpr):
    """Tile i of the row after the edits so far: x + delta."""
    return load_stream_tile(hidden, carried, i, D, TILE, HAS_HIDDEN) + delta[i]


@triton.jit
def norm_of(hidden, carried, delta, D: tl.constexpr, TILE: tl.constexpr, HAS_HIDDEN: tl.constexpr):
    """|x + delta|"""
    total = tl.zeros([TILE], tl.float32)
    for i in tl.static_range(len(delta)):
        now = now_tile(hidden, carried, delta, i, D, TILE, HAS_HIDDEN)
        total += now * now
    return tl.sqrt_rn(tl.sum(total, 0))


@triton.jit
def dot_with(
    row, hidden, carried, delta, D: tl.constexpr, TILE: tl.constexpr, HAS_HIDDEN: tl.constexpr, HOLD: tl.constexpr
):
    """<row, x + delta>. `row` is a tuple of tiles in registers if HOLD, else a pointer."""
    total = tl.zeros([TILE], tl.float32)
    for i in tl.static_range(len(delta)):
        w = row[i] if HOLD else load_tile(row, i, D, TILE)
        total += now_tile(hidden, carried, delta, i, D, TILE, HAS_HIDDEN) * w.to(tl.float32)
    return tl.sum(total, 0)


@triton.jit
def cosine_with(
    row, hidden, carried, delta, D: tl.constexpr, TILE: tl.constexpr, HAS_HIDDEN: tl.constexpr, HOLD: tl.constexpr
):
    """cos(row, x + delta), or 0 if either is zero. `row` is a tuple of tiles in registers if HOLD, else a pointer."""
    length = tl.zeros([TILE], tl.float32)
    dot = tl.zeros([TILE], tl.float32)
    norm = tl.zeros([TILE], tl.float32)
    for i in tl.static_range(len(delta)):
        w = (row[i] if HOLD else load_tile(row, i, D, TILE)).to(tl.float32)
        now = now_tile(hidden, carried, delta, i, D, TILE, HAS_HIDDEN)
        dot += now * w
        length += w * w
        norm += now * now
    size = tl.sqrt_rn(tl.sum(norm, 0)) * tl.sqrt_rn(tl.sum(length, 0))
    return tl.where(size > 0.0, tl.div_rn(tl.sum(dot, 0), tl.where(size > 0.0, size, 1.0)), 0.0)


@triton.jit
def length_of(row, D: tl.constexpr, TILE: tl.constexpr):
    """|row|, with `row` a pointer."""
    total = tl.zeros([TILE], tl.float32)
    for i in tl.static_range(triton.cdiv(D, TILE)):
        w = load_tile(row, i, D, TILE).to(tl.float32)
        total += w * w
    return tl.sqrt_rn(tl.sum(total, 0))


@triton.jit
def number_of(
    entry, when, hidden, carried, delta, bank_RD, D: tl.constexpr, TILE: tl.constexpr, HAS_HIDDEN: tl.constexpr
):
    """What the entry measures: the cosine if its MEASURE is 2, else the dot product."""
    row = bank_RD + tl.load(entry).to(tl.int64) * D
    if ((when >> 18) & 3) == 2:
        number = cosine_with(row, hidden, carried, delta, D, TILE, HAS_HIDDEN, False)
    else:
        number = dot_with(row, hidden, carried, delta, D, TILE, HAS_HIDDEN, False)
    return number


@triton.jit
def share_after_measuring(
    entry,
    first,
    pos,
    windows,
    measured,
    bounds,
    probed,
    hidden,
    carried,
    delta,
    bank_RD,
    D: tl.constexpr,
    TILE: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    NUM_PROBES: tl.constexpr,
):
    """By how much an entry with details edits the row; one that measures does so here, and edits nothing.

    Returns the share; 1 if the entry is a late probe that applies to the row: it has not measured yet; and its WHEN.
    probed: the row's numbers in `probed_TK`.
    """
    late = 0
    when = tl.load(entry + 12)
    if ((when >> 18) & 3) == 0:
        share = share_of(entry, first, pos, windows, measured, bounds, True)
    else:
        share = tl.full((), 0.0, tl.float32)
        now = True
        if NUM_PROBES > 0:
            is_probe = ((when >> 24) & 1) != 0
            if is_probe:
                applies = share_of(entry, first, pos, windows, measured, bounds, True) != 0.0
                late = (applies & (((when >> 25) & 1) != 0)).to(tl.int32)
                now = applies & (late == 0)
        if now:
            number = number_of(entry, when, hidden, carried, delta, bank_RD, D, TILE, HAS_HIDDEN)
            if NUM_PROBES > 0:
                if is_probe:
                    tl.store(probed + tl.load(entry + 9), number)
                else:
                    add_measured(measured, when, number)
            else:
                add_measured(measured, when, number)
    return share, late, when


@triton.jit
def write_late_probes(
    program,
    num_entries,
    pos,
    windows,
    measured,
    bounds,
    probed,
    hidden,
    carried,
    delta,
    bank_RD,
    D: tl.constexpr,
    TILE: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
):
    """Write the numbers of the row's late probes. delta: of all its edits, and of the kept norm.

    One sum at a time: the three of `cosine_with` would spill beside delta at the largest D in float32.
    """
    for e in tl.range(num_entries, disable_licm=True):
        entry = program + e * 16
        start = tl.load(entry + 1)
        first = start & 0x7FFFFFFF
        if (start < 0) & (first <= pos) & (pos < tl.load(entry + 2)):
            when = tl.load(entry + 12)
            if ((when >> 24) & 3) == 3:  # noqa: SIM102  (share_of is only for probes)
                if share_of(entry, first, pos, windows, measured, bounds, True) != 0.0:
                    row = bank_RD + tl.load(entry).to(tl.int64) * D
                    number = dot_with(row, hidden, carried, delta, D, TILE, HAS_HIDDEN, False)
                    if ((when >> 18) & 3) == 2:
                        size = norm_of(hidden, carried, delta, D, TILE, HAS_HIDDEN) * length_of(row, D, TILE)
                        number = tl.where(size > 0.0, tl.div_rn(number, tl.where(size > 0.0, size, 1.0)), 0.0)
                    tl.store(probed + tl.load(entry + 9), number)
