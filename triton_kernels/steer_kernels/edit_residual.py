"""Edit (and capture) the residual stream after one block: one launch per site, one kernel program per token row.

Legend: see `tables`. An unsteered row costs one load of 4 bytes (its slot). A row with adds only moves the minimum: one
read of the stream, one read of each bank row and one write of the stream.
"""

# Triton kernels are untyped Python and do not support starred expressions.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from steer_kernels.details import load_float, share_of
from steer_kernels.launch_table import BACKEND, launch_for
from steer_kernels.measure import cosine_with, dot_with, norm_of, share_after_measuring, write_late_probes
from steer_kernels.modes import add_held, add_scaled, factor_of
from steer_kernels.reference import rows_view
from steer_kernels.tables import Tables
from steer_kernels.tiles import load_row, load_stream_tile, load_tile, store_tile, zero_row


@triton.jit
def apply_adds(program, num_entries, pos, windows, bank_RD, D: tl.constexpr, TILE: tl.constexpr):
    """Returns delta, the sum of c0 * w over the entries in range, and their number. Never reduces over D."""
    delta = zero_row(D, TILE)
    applied = 0
    for e in tl.range(num_entries, disable_licm=True):
        entry = program + e * 16
        w = bank_RD + tl.load(entry).to(tl.int64) * D
        start = tl.load(entry + 1)
        end = tl.load(entry + 2)
        c0 = load_float(entry, 3)
        first = start & 0x7FFFFFFF
        if (first <= pos) & (pos < end):
            if start < 0:
                c0 *= share_of(entry, first, pos, windows, windows, windows, False)
            if (start >= 0) | (c0 != 0.0):
                delta = add_scaled(delta, c0, w, D, TILE, False)
                applied += 1
    return delta, applied


@triton.jit
def apply_edits(
    hidden,
    carried,
    program,
    num_entries,
    pos,
    windows,
    measured,
    bounds,
    probed,
    keep_norm,
    bank_RD,
    D: tl.constexpr,
    TILE: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    HOLD: tl.constexpr,
    NUM_PROBES: tl.constexpr,
):
    """All operations, gates, conditions, kept norms and probes. Returns delta with x' = x + delta, and how many entries
    edited the row.

    x is loaded only for entries that need a sum over D; repeated loads come from cache. So an add in an engine armed
    for all operations moves no more bytes than in one armed for adds. HOLD keeps w in registers between the sum and
    the update, so that w is loaded once.
    """
    delta = zero_row(D, TILE)
    applied = 0
    num_late = 0
    held = tl.zeros([8], tl.float32)
    num_held = 0
    for e in tl.range(num_entries, disable_licm=True):
        entry = program + e * 16
        start = tl.load(entry + 1)
        end = tl.load(entry + 2)
        first = start & 0x7FFFFFFF
        if (first <= pos) & (pos < end):
            gate_row = tl.load(entry + 9).to(tl.int64)
            holds = True
            share = tl.full((), 1.0, tl.float32)
            when = 0
            if start < 0:
                share, late, when = share_after_measuring(
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
                    D,
                    TILE,
                    HAS_HIDDEN,
                    NUM_PROBES,
                )
                num_late += late
                holds = share != 0.0
            if holds & (gate_row >= 0):
                min_cos = load_float(entry, 10)
                max_cos = load_float(entry, 11)
                gate_at = bank_RD + gate_row * D
                gate = load_row(gate_at, D, TILE) if HOLD else gate_at
                if ((when >> 28) & 1) != 0:
                    number = dot_with(gate, hidden, carried, delta, D, TILE, HAS_HIDDEN, HOLD)
                else:
                    number = cosine_with(gate, hidden, carried, delta, D, TILE, HAS_HIDDEN, HOLD)
                holds = (min_cos <= number) & (number <= max_cos)
            if ((when >> 26) & 3) != 0:
                # An entry with a mode. Those of a group wait until its last one, so that all read the same delta.
                g = tl.full((), 0.0, tl.float32)
                if holds:
                    g = factor_of(entry, when, share, hidden, carried, delta, bank_RD, D, TILE, HAS_HIDDEN)
                    applied += 1
                held = tl.where(tl.arange(0, 8) == num_held, g, held)
                num_held += 1
                if ((when >> 29) & 3) != 1:
                    delta = add_held(delta, held, num_held, entry, bank_RD, D, TILE)
                    num_held = 0
            elif holds:
                row = bank_RD + tl.load(entry).to(tl.int64) * D
                g = load_float(entry, 3) * share
                c1 = load_float(entry, 4) * share
                c2 = load_float(entry, 5) * share
                c3 = load_float(entry, 6) * share
                w = load_row(row, D, TILE) if HOLD else row
                if c1 != 0.0:
                    g += c1 * norm_of(hidden, carried, delta, D, TILE, HAS_HIDDEN)
                if (c2 != 0.0) | (c3 != 0.0):
                    dot = dot_with(w, hidden, carried, delta, D, TILE, HAS_HIDDEN, HOLD)
                    clipped = tl.minimum(tl.maximum(dot, load_float(entry, 7)), load_float(entry, 8))
                    g += c2 * dot
                    g += c3 * (clipped - dot)
                delta = add_scaled(delta, g, w, D, TILE, HOLD)
                applied += 1
    if (applied > 0) & (tl.load(keep_norm) != 0):
        after = norm_of(hidden, carried, delta, D, TILE, HAS_HIDDEN)
        before = norm_of(hidden, carried, zero_row(D, TILE), D, TILE, HAS_HIDDEN)
        if after > 0.0:
            delta = rescaled(hidden, carried, delta, tl.div_rn(before, after), D, TILE, HAS_HIDDEN)
    if NUM_PROBES > 0:  # noqa: SIM102  (a compile-time constant)
        if num_late > 0:
            write_late_probes(
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
                D,
                TILE,
                HAS_HIDDEN,
            )
    return delta, applied


@triton.jit
def rescaled(hidden, carried, delta, ratio, D: tl.constexpr, TILE: tl.constexpr, HAS_HIDDEN: tl.constexpr):
    """The new delta for which x + delta equals ratio * (x + old delta)."""
    tiles = ()
    for i in tl.static_range(len(delta)):
        x = load_stream_tile(hidden, carried, i, D, TILE, HAS_HIDDEN)
        tiles = tiles + ((x + delta[i]) * ratio - x,)
    return tiles


@triton.jit
def capture_row(
    capture_at,
    captured_CD,
    hidden,
    carried,
    D: tl.constexpr,
    TILE: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
):
    """Store x in the capture row whose number, counted from 1, is at `capture_at`. 0 = the row is not captured.

    Returns that number. It is negative if the edited x was requested: then an edit overwrites what is stored here, and
    a row without an edit keeps it.
    """
    place = tl.load(capture_at).to(tl.int64)
    if place != 0:
        target = capture_target(captured_CD, place, D)
        for i in tl.static_range(triton.cdiv(D, TILE)):
            store_tile(target, i, load_stream_tile(hidden, carried, i, D, TILE, HAS_HIDDEN), D, TILE)
    return place


@triton.jit
def capture_target(captured_CD, place, D: tl.constexpr):
    """Pointer to the capture row with the number `place` (its sign is ignored)."""
    return captured_CD + (tl.abs(place) - 1) * D


@triton.jit(do_not_specialize=["site"])
def edit_residual_kernel(
    hidden_TD,
    carried_TD,
    bank_RD,
    entries_SLEW,
    counts_SL,
    keep_norm_S,
    slot_T,
    pos_T,
    windows_TJ,
    measured_SQ,
    bounds_SQ2,
    capture_T,
    captured_CD,
    probed_TK,
    site,
    D: tl.constexpr,
    HIDDEN_STRIDE: tl.constexpr,
    CARRIED_STRIDE: tl.constexpr,
    NUM_SITES: tl.constexpr,
    NUM_ENTRIES: tl.constexpr,
    NUM_PROBES: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    ADDS_ONLY: tl.constexpr,
    CAPTURE: tl.constexpr,
    TILE: tl.constexpr,
    HOLD: tl.constexpr,
):
    """Semantics: for row t with s = slot_T[t], p = pos_T[t], x = float32(hidden[t]) + float32(carried[t]):

        capture_T[t] = k > 0:   captured[site, k - 1] = round(x)
        capture_T[t] = -k < 0:  captured[site, k - 1] = round(hidden[t] + carried[t]), after the edit
        for entry in entries[s, site, :counts[s, site]], if s > 0, start <= p < end, share != 0 and the gate is open:
            x += share * g(x) * w, with g as in `tables`; the entries of a group read the x before the group
        if keep_norm[s] and any applied:  x *= |x before| / |x|
        probes instead write <x,w> or cos(x,w) to probed[t, column] in their turn, or after the kept norm if late
        if any applied:  carried[t] = round(float32(carried[t]) + (x - x before))

    Shapes: hidden, carried [T, D] with unit column stride; the rest as in `Tables`. D, strides and table sizes are
    compile-time constants, so that the compiler knows the alignment of every row. Math is float32, offsets are int64.
    Aliasing: carried is written in place and must overlap no other tensor. ADDS_ONLY loads hidden only to capture,
    and has no probes. NUM_PROBES = 0: there are none, and probed_TK is not used.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_T + row).to(tl.int64)
    hidden = hidden_TD + row * HIDDEN_STRIDE
    carried = carried_TD + row * CARRIED_STRIDE
    capture_place = 0
    if CAPTURE:
        capture_place = capture_row(capture_T + row, captured_CD, hidden, carried, D, TILE, HAS_HIDDEN)
    if slot == 0:
        return
    place = slot * NUM_SITES + site
    num_entries = tl.load(counts_SL + place)
    if num_entries == 0:
        return
    pos = tl.load(pos_T + row)
    program = entries_SLEW + place * (NUM_ENTRIES * 16)
    windows = windows_TJ + row * 8
    if ADDS_ONLY:
        # Loaded before the loop over the entries, so that its latency overlaps with theirs and the bank rows'.
        before = load_row(carried, D, TILE) if HOLD else ()
        delta, applied = apply_adds(program, num_entries, pos, windows, bank_RD, D, TILE)
    else:
        delta, applied = apply_edits(
            hidden,
            carried,
            program,
            num_entries,
            pos,
            windows,
            measured_SQ + slot * 8,
            bounds_SQ2 + slot * 16,
            probed_TK + row * NUM_PROBES,
            keep_norm_S + slot,
            bank_RD,
            D,
            TILE,
            HAS_HIDDEN,
            HOLD,
            NUM_PROBES,
        )
    if applied > 0:
        for i in tl.static_range(len(delta)):
            tile = before[i] if ADDS_ONLY and HOLD else load_tile(carried, i, D, TILE)
            edited = tile.to(tl.float32) + delta[i]
            store_tile(carried, i, edited, D, TILE)
            if CAPTURE:  # noqa: SIM102  (a compile-time constant)
                if capture_place < 0:
                    x = edited.to(tile.dtype).to(tl.float32)
                    if HAS_HIDDEN:
                        x = load_tile(hidden, i, D, TILE).to(tl.float32) + x
                    target = capture_target(captured_CD, capture_place, D)
                    store_tile(target, i, x, D, TILE)


def edit_residual(
    hidden: torch.Tensor | None,
    carried: torch.Tensor,
    tables: Tables,
    site: int,
    *,
    adds_only: bool,
    capture: bool,
) -> None:
    """Edit `carried` [..., T, D] in place at `site`. x = hidden + carried, or carried alone if hidden is None.

    adds_only: every entry is an add without a gate or conditions, no slot preserves the norm, and there are no probes.
    Safe in a CUDA graph: there is no host sync, and values that change between steps are in the device tables.
    """
    carried_TD = rows_view(carried)
    hidden_TD = carried_TD if hidden is None else rows_view(hidden)
    num_tokens = carried_TD.shape[0]
    if num_tokens == 0:
        return
    captured_CD = tables.captured_at(site) if capture else None
    assert not adds_only or tables.probed_TK is None, "an engine that only adds has no probes"
    hidden_size = carried_TD.shape[1]
    edit_residual_kernel[(num_tokens,)](
        hidden_TD,
        carried_TD,
        tables.bank_RD,
        tables.entries_SLEW,
        tables.counts_SL,
        tables.keep_norm_S,
        tables.slot_T,
        tables.pos_T,
        tables.windows_TJ,
        tables.measured_SQ,
        tables.bounds_SQ2,
        tables.slot_T if captured_CD is None else tables.capture_T,
        carried_TD if captured_CD is None else captured_CD,
        tables.bounds_SQ2 if tables.probed_TK is None else tables.probed_TK,
        site,
        HIDDEN_STRIDE=row_stride(hidden_TD),
        CARRIED_STRIDE=row_stride(carried_TD),
        NUM_SITES=tables.counts_SL.shape[1],
        NUM_ENTRIES=tables.entries_SLEW.shape[2],
        NUM_PROBES=0 if tables.probed_TK is None else tables.probed_TK.shape[1],
        HAS_HIDDEN=hidden is not None,
        ADDS_ONLY=adds_only,
        CAPTURE=captured_CD is not None,
        **launch_for(hidden_size).constants(hidden_size),
        **launch_for(hidden_size).options(BACKEND),
    )


def row_stride(stream_TD: torch.Tensor) -> int:
    """Elements between rows. D for a single row: its stride is meaningless and would compile another kernel."""
    num_tokens, hidden_size = stream_TD.shape
    assert hidden_size == 1 or stream_TD.stride(1) == 1, "the hidden dimension must be contiguous"
    return hidden_size if num_tokens == 1 else stream_TD.stride(0)
