"""Advance the triggers of the step's requests: one small launch per step, only if a running request has triggers.

Legend: see `tables`; the rules are in `trigger_windows`. B requests of the batch, H positions of history.
"""

# Triton kernels are untyped Python.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from steer_kernels.tables import MAX_TRIGGER_TOKENS, MAX_TRIGGERS, TRIGGER_WORDS, Tables

# One warp per program: it runs in lockstep, so no thread writes what another has still to read.
BLOCK: Final = 128
OPTIONS: Final[dict[str, int | bool]] = {"num_warps": 1, "enable_fp_fusion": False}


@triton.jit
def larger(a, b):
    return tl.maximum(a, b)


@triton.jit
def last_token(input_ids_T, history, row, first_row, pos, back, is_row, H: tl.constexpr, C: tl.constexpr):
    """The token `back` positions before each row: of this step as far as it goes, before that of the history."""
    in_step = row - back >= first_row
    new = tl.load(input_ids_T + row - back, mask=is_row & in_step, other=-1).to(tl.int32)
    old = tl.load(history + ((pos - back + H) % H) * C, mask=is_row & (row - back < first_row), other=-1)
    return tl.where(in_step, new, old)


@triton.jit
def ends_here(
    sequence, input_ids_T, history, row, first_row, pos, back, is_row, H: tl.constexpr, C: tl.constexpr, M: tl.constexpr
):
    """Whether the sequence, stored last token first, ends `back` positions before each row."""
    matches = is_row
    for m in tl.static_range(M):
        wanted = tl.load(sequence + m)
        if wanted != -2:
            matches &= last_token(input_ids_T, history, row, first_row, pos, back + m, is_row, H, C) == wanted
    return matches


@triton.jit(
    # Slices of the engine's buffers have any alignment. It must not trigger a compilation while serving.
    do_not_specialize_on_alignment=["query_start_loc_B1", "idx_mapping_B", "positions_T", "input_ids_T"],
)
def advance_triggers_kernel(
    query_start_loc_B1,
    idx_mapping_B,
    positions_T,
    input_ids_T,
    triggers_SJP,
    num_triggers_S,
    history_SHC,
    windows_TJ,
    J: tl.constexpr,
    P: tl.constexpr,
    M: tl.constexpr,
    H: tl.constexpr,
    HISTORY_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Semantics: see `trigger_windows`. One program per request; it reads its slot's history before it writes it.

    Shapes: query_start_loc int32 [B + 1], idx_mapping int32 [B] (-1 = not steered), positions int32 or int64 [T],
    input_ids int32 or int64 [T]; the rest as in `Tables`.
    """
    request = tl.program_id(0)
    slot = tl.load(idx_mapping_B + request).to(tl.int64) + 1
    num_triggers = tl.load(num_triggers_S + slot)
    first_row = tl.load(query_start_loc_B1 + request)
    end_row = tl.load(query_start_loc_B1 + request + 1)
    if (num_triggers == 0) | (first_row >= end_row):
        return
    C: tl.constexpr = 1 + 2 * J
    history = history_SHC + slot * (H * C)
    first_pos = tl.load(positions_T + first_row).to(tl.int32)
    before = history + ((first_pos - 1 + H) % H) * C
    unknown = -(2**30)
    for j in tl.range(num_triggers):
        trigger = triggers_SJP + (slot * J + j) * P
        each = tl.load(trigger) != 0
        length = tl.load(trigger + 1)
        opened_before = tl.load(before + 1 + j)
        closed_before = tl.load(before + 1 + J + j)
        # A running maximum finds the last occurrence; of negated positions, the first.
        sign = tl.where(each, 1, -1)
        known = (opened_before == -2) | each
        best = tl.full((), unknown, tl.int32)
        closed = closed_before
        for start in tl.range(first_row, end_row, BLOCK):
            row = start + tl.arange(0, BLOCK)
            is_row = row < end_row
            pos = tl.load(positions_T + row, mask=is_row, other=0).to(tl.int32)
            opens = ends_here(trigger + 2, input_ids_T, history, row, first_row, pos, 1, is_row, H, C, M)
            closes = ends_here(trigger + 2 + M, input_ids_T, history, row, first_row, pos, 0, is_row, H, C, M)
            found = tl.where(opens, sign * (pos - 1), unknown)
            found = tl.maximum(tl.associative_scan(found, 0, larger), best)
            ended = tl.where(closes, pos, -2)
            ended = tl.maximum(tl.associative_scan(ended, 0, larger), closed)
            opened = tl.where((found != unknown) & known, sign * found, opened_before)
            is_open = (opened != -2) & (ended <= opened) & (pos - opened <= length)
            window = tl.where(is_open, opened + 1, 2147483647)
            tl.store(windows_TJ + row.to(tl.int64) * J + j, window, mask=is_row)
            is_kept = is_row & (row >= end_row - H)
            entry = history + (pos % H) * C
            tl.store(entry + 1 + j, opened, mask=is_kept)
            tl.store(entry + 1 + J + j, ended, mask=is_kept)
            best = tl.max(found, 0)
            closed = tl.max(ended, 0)
    tl.debug_barrier()
    # Last, because the sequences of every trigger are matched with the old tokens.
    row = end_row - HISTORY_BLOCK + tl.arange(0, HISTORY_BLOCK)
    is_kept = (row >= first_row) & (row >= end_row - H)
    pos = tl.load(positions_T + row, mask=is_kept, other=0).to(tl.int32)
    token = tl.load(input_ids_T + row, mask=is_kept, other=-1).to(tl.int32)
    tl.store(history + (pos % H) * C, token, mask=is_kept)


def advance_triggers(
    query_start_loc_B1: torch.Tensor,
    idx_mapping_B: torch.Tensor,
    positions_T: torch.Tensor,
    input_ids_T: torch.Tensor,
    tables: Tables,
) -> None:
    """Write the windows of the step's rows, and the history of their slots, on the device, without a host sync.

    idx_mapping_B: batch position -> request-state index (slot - 1), or -1 for an unsteered request.
    input_ids_T: the token of each row.
    """
    num_requests = idx_mapping_B.shape[0]
    if num_requests == 0:
        return
    num_positions = tables.history_SHC.shape[1]
    advance_triggers_kernel[(num_requests,)](
        query_start_loc_B1,
        idx_mapping_B,
        positions_T,
        input_ids_T,
        tables.triggers_SJP,
        tables.num_triggers_S,
        tables.history_SHC,
        tables.windows_TJ,
        J=MAX_TRIGGERS,
        P=TRIGGER_WORDS,
        M=MAX_TRIGGER_TOKENS,
        H=num_positions,
        HISTORY_BLOCK=triton.next_power_of_2(num_positions),
        BLOCK=BLOCK,
        **OPTIONS,
    )
