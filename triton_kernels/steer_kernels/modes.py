"""Entries that read one bank row and write another, and groups of them that read the same x.

Legend: see `tables`. `delta` is a tuple of tiles (see `tiles`); the row as edited so far is x + delta.
"""

# Triton kernels are untyped Python and do not support starred expressions.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,assignment"

from __future__ import annotations

import triton
import triton.language as tl

from steer_kernels.details import load_float
from steer_kernels.measure import dot_with
from steer_kernels.tiles import load_tile


@triton.jit
def add_scaled(delta, scale, row, D: tl.constexpr, TILE: tl.constexpr, HOLD: tl.constexpr):
    """delta + scale * row. `row` is a tuple of tiles in registers if HOLD, else a pointer."""
    tiles = ()
    for i in tl.static_range(len(delta)):
        w = row[i] if HOLD else load_tile(row, i, D, TILE)
        tiles = tiles + (delta[i] + scale * w.to(tl.float32),)
    return tiles


@triton.jit
def factor_of(
    entry,
    when,
    share,
    hidden,
    carried,
    delta,
    bank_RD,
    D: tl.constexpr,
    TILE: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
):
    """share * g(x) of an entry with a mode; see `tables`."""
    mode = (when >> 26) & 3
    own = tl.full((), 0.0, tl.float32)
    dot = tl.full((), 0.0, tl.float32)
    # One loop, not two: rows of float32 with the largest D have no registers left for a second one.
    for word in tl.range(4 if mode != 3 else 0, 5, 4, disable_licm=True):
        own = dot
        row = bank_RD + tl.load(entry + word).to(tl.int64) * D
        dot = dot_with(row, hidden, carried, delta, D, TILE, HAS_HIDDEN, False)
    g = load_float(entry, 3) * share
    c2 = load_float(entry, 5) * share
    c3 = load_float(entry, 6) * share
    if mode == 3:
        g = g * tl.sqrt_rn(own * own + dot * dot)
        g += c2 * own
        g += c3 * dot
    else:
        lo = load_float(entry, 7)
        hi = load_float(entry, 8)
        if mode == 2:
            g += tl.where((lo <= dot) & (dot <= hi), c2 * dot + c3, 0.0)
        else:
            g += c2 * dot
            g += c3 * (tl.minimum(tl.maximum(dot, lo), hi) - dot)
    return g


@triton.jit
def add_held(delta, numbers, num_numbers, last, bank_RD, D: tl.constexpr, TILE: tl.constexpr):
    """delta + number * w for each entry of a group, in order. last: its last entry. Numbers of 0 load no row.

    numbers: 8 lanes, since 8 scalars would spill at the largest D in float32.
    """
    first = last - (num_numbers - 1) * 16
    for i in tl.range(num_numbers, disable_licm=True):
        g = tl.sum(tl.where(tl.arange(0, 8) == i, numbers, 0.0), 0)
        if g != 0.0:
            row = bank_RD + tl.load(first + i * 16).to(tl.int64) * D
            delta = add_scaled(delta, g, row, D, TILE, False)
    return delta
