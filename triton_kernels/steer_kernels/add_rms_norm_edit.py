"""Residual add, edit and RMSNorm in one launch, for a block whose output goes directly into a fused add and norm.

Legend: see `tables`. Compared with vLLM's own fused add and norm, a steered row loads one more bank row, without an
extra launch.
"""

# Triton kernels are untyped Python and do not support starred expressions.
# mypy: disable-error-code="untyped-decorator,no-untyped-def,assignment"

from __future__ import annotations

import torch
import triton
import triton.language as tl

from steer_kernels.edit_residual import apply_adds, apply_edits, capture_row, capture_target, row_stride
from steer_kernels.launch_table import BACKEND, launch_for
from steer_kernels.reference import rows_view
from steer_kernels.tables import Tables
from steer_kernels.tiles import load_stream_tile, load_tile, store_tile, zero_row


@triton.jit
def edited_row(hidden, residual, delta, D: tl.constexpr, TILE: tl.constexpr):
    """The tiles of x + delta."""
    tiles = ()
    for i in tl.static_range(len(delta)):
        tiles = tiles + (load_stream_tile(hidden, residual, i, D, TILE, True) + delta[i],)
    return tiles


@triton.jit(do_not_specialize=["site"])
def add_rms_norm_edit_kernel(
    hidden_TD,
    residual_TD,
    weight_D,
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
    epsilon,
    D: tl.constexpr,
    HIDDEN_STRIDE: tl.constexpr,
    RESIDUAL_STRIDE: tl.constexpr,
    NUM_SITES: tl.constexpr,
    NUM_ENTRIES: tl.constexpr,
    NUM_PROBES: tl.constexpr,
    ADDS_ONLY: tl.constexpr,
    CAPTURE: tl.constexpr,
    TILE: tl.constexpr,
    HOLD: tl.constexpr,
):
    """Semantics: for each row t, x = float32(hidden[t]) + float32(residual[t]), x' = x edited by `edit_residual`:

        residual[t] = round(x')
        hidden[t]   = round(x' / sqrt(mean(x'^2) + epsilon) * weight)

    Probes measure x, late ones x', as in `edit_residual`.

    Shapes: hidden, residual [T, D] with unit column stride; weight [D]; the rest as in `Tables`. The norm uses
    the float32 x', not the rounded one. Aliasing: hidden and residual are written in place and overlap no other tensor.
    """
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slot_T + row).to(tl.int64)
    hidden = hidden_TD + row * HIDDEN_STRIDE
    residual = residual_TD + row * RESIDUAL_STRIDE
    capture_place = 0
    if CAPTURE:
        capture_place = capture_row(capture_T + row, captured_CD, hidden, residual, D, TILE, True)
    delta = zero_row(D, TILE)
    if slot != 0:
        place = slot * NUM_SITES + site
        num_entries = tl.load(counts_SL + place)
        pos = tl.load(pos_T + row)
        program = entries_SLEW + place * (NUM_ENTRIES * 16)
        windows = windows_TJ + row * 8
        if ADDS_ONLY:
            delta, _ = apply_adds(program, num_entries, pos, windows, bank_RD, D, TILE)
        else:
            delta, _ = apply_edits(
                hidden,
                residual,
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
                True,
                HOLD,
                NUM_PROBES,
            )
    x = edited_row(hidden, residual, delta, D, TILE) if HOLD else ()
    total = tl.zeros([TILE], tl.float32)
    for i in tl.static_range(len(delta)):
        tile = x[i] if HOLD else load_stream_tile(hidden, residual, i, D, TILE, True) + delta[i]
        total += tile * tile
    scale = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(total, 0), D * 1.0) + epsilon))
    for i in tl.static_range(len(delta)):
        tile = x[i] if HOLD else load_stream_tile(hidden, residual, i, D, TILE, True) + delta[i]
        weight = load_tile(weight_D, i, D, TILE).to(tl.float32)
        store_tile(residual, i, tile, D, TILE)
        if CAPTURE:  # noqa: SIM102  (a compile-time constant)
            if capture_place < 0:
                target = capture_target(captured_CD, capture_place, D)
                store_tile(target, i, tile.to(residual_TD.dtype.element_ty), D, TILE)
        store_tile(hidden, i, tile * scale * weight, D, TILE)


def add_rms_norm_edit(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    weight_D: torch.Tensor,
    tables: Tables,
    site: int,
    *,
    epsilon: float,
    adds_only: bool,
    capture: bool,
) -> None:
    """Like vLLM's `fused_add_rms_norm(hidden, residual, weight, epsilon)`, with the edit of `site` applied to the sum.

    hidden, residual [..., T, D]: on input, the output of block `site`; on return, the normed rows and the stream.
    Safe in a CUDA graph, like `edit_residual`.
    """
    hidden_TD, residual_TD = rows_view(hidden), rows_view(residual)
    num_tokens, hidden_size = residual_TD.shape
    if num_tokens == 0:
        return
    assert not adds_only or tables.probed_TK is None, "an engine that only adds has no probes"
    captured_CD = tables.captured_at(site) if capture else None
    add_rms_norm_edit_kernel[(num_tokens,)](
        hidden_TD,
        residual_TD,
        weight_D,
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
        residual_TD if captured_CD is None else captured_CD,
        tables.bounds_SQ2 if tables.probed_TK is None else tables.probed_TK,
        site,
        epsilon,
        HIDDEN_STRIDE=row_stride(hidden_TD),
        RESIDUAL_STRIDE=row_stride(residual_TD),
        NUM_SITES=tables.counts_SL.shape[1],
        NUM_ENTRIES=tables.entries_SLEW.shape[2],
        NUM_PROBES=0 if tables.probed_TK is None else tables.probed_TK.shape[1],
        ADDS_ONLY=adds_only,
        CAPTURE=captured_CD is not None,
        **launch_for(hidden_size).constants(hidden_size),
        **launch_for(hidden_size).options(BACKEND),
    )
