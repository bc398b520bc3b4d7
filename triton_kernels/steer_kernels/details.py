"""The details of an entry inside the kernels: windows of triggers, schedules, conditions, and what it measures.

Legend: see `tables`. Only an entry whose START is negative has details; other entries load none of these words.
"""

# Triton kernels are untyped Python.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_float(words, index):
    """Load the word at `index` and reinterpret its bits as float32."""
    return tl.load(words + index).to(tl.float32, bitcast=True)


@triton.jit
def share_of(entry, first, pos, windows, measured, bounds, CONDITIONS: tl.constexpr):
    """By how much an entry with details applies to a row at `pos`; 0 = not at all.

    first: the entry's start. windows: the row's in `windows_TJ`. measured, bounds: the slot's; see `Tables`.
    """
    when = tl.load(entry + 12)
    over = tl.load(entry + 13)
    share = tl.full((), 1.0, tl.float32)
    trigger = when & 15
    if trigger > 0:
        first = tl.load(windows + trigger - 1)
        share = tl.where(first <= pos, share, 0.0)
    exclude = (when >> 4) & 15
    if exclude > 0:
        share = tl.where(tl.load(windows + exclude - 1) <= pos, 0.0, share)
    if over > 0:
        # Before its window a row has share 0; the bound keeps its unused number finite.
        since = tl.maximum(pos - first, 0)
        change = load_float(entry, 14) * since.to(tl.float32)
        now = tl.where((when & (1 << 17)) != 0, tl.exp2(change), 1.0 + change)
        share *= tl.where(since >= over, load_float(entry, 15), now)
    if CONDITIONS:
        asked = (when >> 8) & 255
        if asked != 0:
            held = 0
            failed = 0
            for q in tl.range(8):
                if ((asked >> q) & 1) != 0:
                    number = tl.load(measured + q)
                    holds = (tl.load(bounds + 2 * q) < number) & (number < tl.load(bounds + 2 * q + 1))
                    held += holds.to(tl.int32)
                    failed += 1 - holds.to(tl.int32)
            enough = tl.where((when & (1 << 16)) != 0, held > 0, failed == 0)
            share = tl.where(enough, share, 0.0)
    return share


@triton.jit
def add_measured(measured, when, number):
    """Add a row's number to a condition of its slot, or keep the largest. In float64, so that order has no effect."""
    total = measured + ((when >> 20) & 7)
    number = number.to(tl.float64)
    if ((when >> 23) & 1) != 0:
        tl.atomic_max(total, number, sem="relaxed")
    else:
        tl.atomic_add(total, number, sem="relaxed")
