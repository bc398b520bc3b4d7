"""A row of D elements in registers: a tuple of tiles of TILE lanes. The last tile is masked if TILE does not divide D.

Why tiles: a tile is one or a few 16-byte vectors per thread for any D, so D need not be a power of two. A sum over D
needs one accumulator per lane of a tile, not one product per lane of the row.
"""

# Triton kernels are untyped Python and do not support starred expressions.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_tile(row, i: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr):
    """Tile i of the row at pointer `row`, in its own dtype. Lanes beyond D are 0 and load nothing."""
    offs = i * TILE + tl.arange(0, TILE)
    return tl.load(row + offs, mask=offs < D, other=0.0)


@triton.jit
def store_tile(row, i: tl.constexpr, tile, D: tl.constexpr, TILE: tl.constexpr):
    """Round a float32 tile to the dtype of `row` and store its lanes below D."""
    offs = i * TILE + tl.arange(0, TILE)
    tl.store(row + offs, tile.to(row.dtype.element_ty), mask=offs < D)


@triton.jit
def load_stream_tile(hidden, carried, i: tl.constexpr, D: tl.constexpr, TILE: tl.constexpr, HAS_HIDDEN: tl.constexpr):
    """Tile i of x = hidden + carried, or of carried alone, in float32."""
    x = load_tile(carried, i, D, TILE).to(tl.float32)
    if HAS_HIDDEN:
        x = load_tile(hidden, i, D, TILE).to(tl.float32) + x
    return x


@triton.jit
def load_row(row, D: tl.constexpr, TILE: tl.constexpr):
    tiles = ()
    for i in tl.static_range(triton.cdiv(D, TILE)):
        tiles = tiles + (load_tile(row, i, D, TILE),)
    return tiles


@triton.jit
def zero_row(D: tl.constexpr, TILE: tl.constexpr):
    tiles = ()
    for _ in tl.static_range(triton.cdiv(D, TILE)):
        tiles = tiles + (tl.zeros([TILE], tl.float32),)
    return tiles
