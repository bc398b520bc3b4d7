# Triton kernels are untyped Python.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"
"""Edit (and read) the residual stream after one block: one launch a site, one program a token row.

Legend: see `tables`. An unsteered row costs the 4 bytes of its slot; a row of pure adds costs its floor, which is one
read of the stream, one read of each bank row and one write of the stream.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from steer_kernels.launch_table import launch_for
from steer_kernels.reference import rows_view
from steer_kernels.tables import Tables


@triton.jit
def apply_adds(delta, program, num_entries, pos, bank_RD, offs, mask, D: tl.constexpr):
    """delta + the sum of c0 * w over the entries in range, and how many there were. Never reduces over D."""
    applied = 0
    for e in range(num_entries):
        entry = program + e * 16
        w_row = tl.load(entry).to(tl.int64)
        start = tl.load(entry + 1)
        end = tl.load(entry + 2)
        c0 = tl.load(entry + 3).to(tl.float32, bitcast=True)
        if (start <= pos) & (pos < end):
            w = tl.load(bank_RD + w_row * D + offs, mask=mask, other=0.0).to(tl.float32)
            delta += c0 * w
            applied += 1
    return delta, applied


@triton.jit
def apply_edits(x, delta, program, num_entries, pos, keep_norm, bank_RD, offs, mask, D: tl.constexpr):
    """The whole algebra: delta such that x' = x + delta, and how many entries applied.

    A reduction runs only where a coefficient asks for it, so that adds in an engine armed for everything stay cheap.
    """
    applied = 0
    for e in range(num_entries):
        entry = program + e * 16
        w_row = tl.load(entry).to(tl.int64)
        start = tl.load(entry + 1)
        end = tl.load(entry + 2)
        c0 = tl.load(entry + 3).to(tl.float32, bitcast=True)
        if (start <= pos) & (pos < end):
            c1 = tl.load(entry + 4).to(tl.float32, bitcast=True)
            c2 = tl.load(entry + 5).to(tl.float32, bitcast=True)
            c3 = tl.load(entry + 6).to(tl.float32, bitcast=True)
            lo = tl.load(entry + 7).to(tl.float32, bitcast=True)
            hi = tl.load(entry + 8).to(tl.float32, bitcast=True)
            gate_row = tl.load(entry + 9).to(tl.int64)
            now = x + delta
            holds = True
            if gate_row >= 0:
                min_cos = tl.load(entry + 10).to(tl.float32, bitcast=True)
                max_cos = tl.load(entry + 11).to(tl.float32, bitcast=True)
                gate = tl.load(bank_RD + gate_row * D + offs, mask=mask, other=0.0).to(tl.float32)
                size = tl.sqrt(tl.sum(now * now, 0)) * tl.sqrt(tl.sum(gate * gate, 0))
                cos = tl.where(size > 0.0, tl.sum(now * gate, 0) / size, 0.0)
                holds = (min_cos <= cos) & (cos <= max_cos)
            if holds:
                w = tl.load(bank_RD + w_row * D + offs, mask=mask, other=0.0).to(tl.float32)
                g = c0
                if c1 != 0.0:
                    g += c1 * tl.sqrt(tl.sum(now * now, 0))
                if (c2 != 0.0) | (c3 != 0.0):
                    dot = tl.sum(now * w, 0)
                    clipped = tl.minimum(tl.maximum(dot, lo), hi)
                    g += c2 * dot + c3 * (clipped - dot)
                delta += g * w
                applied += 1
    if (applied > 0) & (keep_norm != 0):
        edited = x + delta
        norm = tl.sqrt(tl.sum(edited * edited, 0))
        if norm > 0.0:
            delta = edited * (tl.sqrt(tl.sum(x * x, 0)) / norm) - x
    return delta, applied


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
    capture_T,
    captured_LCD,
    site,
    D: tl.constexpr,
    HIDDEN_STRIDE: tl.constexpr,
    CARRIED_STRIDE: tl.constexpr,
    NUM_SITES: tl.constexpr,
    NUM_ENTRIES: tl.constexpr,
    NUM_CAPTURE_ROWS: tl.constexpr,
    HAS_HIDDEN: tl.constexpr,
    ADDS_ONLY: tl.constexpr,
    CAPTURE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Semantics: for row t with s = slot_T[t], p = pos_T[t], x = float32(hidden[t]) + float32(carried[t]):

        capture_T[t] = k > 0:   captured[site, k - 1] = round(x)
        for entry in entries[s, site, :counts[s, site]], if start <= p < end and the gate holds:
            x += (c0 + c1*|x| + c2*<x,w> + c3*(clip(<x,w>, lo, hi) - <x,w>)) * w
        if keep_norm[s] and any applied:  x *= |x before| / |x|
        if any applied:  carried[t] = round(float32(carried[t]) + (x - x before))

    Shapes: hidden, carried [T, D] with unit column stride; the rest as in `Tables`. D, strides and table sizes are
    constants of an engine, so that the compiler knows the alignment of every row. Math is float32, offsets int64.
    Aliasing: carried is written in place and must overlap nothing else. ADDS_ONLY reads hidden only to capture.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_T + row).to(tl.int64)
    offs = tl.arange(0, BLOCK)
    mask = offs < D
    if CAPTURE:
        reader = tl.load(capture_T + row).to(tl.int64)
        if reader > 0:
            x = tl.load(carried_TD + row * CARRIED_STRIDE + offs, mask=mask, other=0.0).to(tl.float32)
            if HAS_HIDDEN:
                x += tl.load(hidden_TD + row * HIDDEN_STRIDE + offs, mask=mask, other=0.0).to(tl.float32)
            target = captured_LCD + (site.to(tl.int64) * NUM_CAPTURE_ROWS + reader - 1) * D
            tl.store(target + offs, x.to(captured_LCD.dtype.element_ty), mask=mask)
    if slot == 0:
        return
    place = slot * NUM_SITES + site
    num_entries = tl.load(counts_SL + place)
    if num_entries == 0:
        return
    pos = tl.load(pos_T + row)
    program = entries_SLEW + place * (NUM_ENTRIES * 16)
    # Asked for before the program is walked, so that its latency hides behind that of the entries and bank rows.
    carried = tl.load(carried_TD + row * CARRIED_STRIDE + offs, mask=mask, other=0.0).to(tl.float32)
    delta = tl.zeros([BLOCK], tl.float32)
    if ADDS_ONLY:
        delta, applied = apply_adds(delta, program, num_entries, pos, bank_RD, offs, mask, D)
    else:
        x = carried
        if HAS_HIDDEN:
            x += tl.load(hidden_TD + row * HIDDEN_STRIDE + offs, mask=mask, other=0.0).to(tl.float32)
        keep_norm = tl.load(keep_norm_S + slot)
        delta, applied = apply_edits(x, delta, program, num_entries, pos, keep_norm, bank_RD, offs, mask, D)
    if applied > 0:
        edited = (carried + delta).to(carried_TD.dtype.element_ty)
        tl.store(carried_TD + row * CARRIED_STRIDE + offs, edited, mask=mask)


def edit_residual(
    hidden: torch.Tensor | None,
    carried: torch.Tensor,
    tables: Tables,
    site: int,
    *,
    adds_only: bool,
    capture: bool,
) -> None:
    """Edits `carried` [..., T, D] in place at `site`: x = hidden + carried, or carried alone if hidden is None.

    adds_only: no entry uses more than the first 16 bytes, and no slot keeps its norm.
    Safe in a CUDA graph: no host sync, and what differs between steps is read from the tables on the device.
    """
    carried_TD = rows_view(carried)
    hidden_TD = carried_TD if hidden is None else rows_view(hidden)
    num_tokens = carried_TD.shape[0]
    if num_tokens == 0:
        return
    launch = launch_for(carried_TD.shape[1], carried_TD.element_size())
    assert not capture or tables.captured_LCD is not None, "these tables have no capture buffers"
    edit_residual_kernel[(num_tokens,)](
        hidden_TD,
        carried_TD,
        tables.bank_RD,
        tables.entries_SLEW,
        tables.counts_SL,
        tables.keep_norm_S,
        tables.slot_T,
        tables.pos_T,
        tables.capture_T if capture else tables.slot_T,
        tables.captured_LCD if capture else carried_TD,
        site,
        D=carried_TD.shape[1],
        HIDDEN_STRIDE=_row_stride(hidden_TD),
        CARRIED_STRIDE=_row_stride(carried_TD),
        NUM_SITES=tables.counts_SL.shape[1],
        NUM_ENTRIES=tables.entries_SLEW.shape[2],
        NUM_CAPTURE_ROWS=0 if tables.captured_LCD is None else tables.captured_LCD.shape[1],
        HAS_HIDDEN=hidden is not None,
        ADDS_ONLY=adds_only,
        CAPTURE=capture,
        BLOCK=launch.block,
        **launch.options,
    )


def _row_stride(stream_TD: torch.Tensor) -> int:
    """Elements between rows; D for a single row, whose stride means nothing and would only compile another kernel."""
    num_tokens, hidden_size = stream_TD.shape
    assert hidden_size == 1 or stream_TD.stride(1) == 1, "the hidden dimension must be contiguous"
    return hidden_size if num_tokens == 1 else stream_TD.stride(0)
