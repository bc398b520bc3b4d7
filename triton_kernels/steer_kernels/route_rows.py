"""Find the slot and the position of each token row of the batch: one small launch per step.

Legend: see `tables`; B requests of the batch.
"""

# Triton kernels are untyped Python.
# mypy: disable-error-code="untyped-decorator,no-untyped-def"

from __future__ import annotations

from typing import Final

import torch
import triton
import triton.language as tl

from steer_kernels.tables import Tables

# One warp per program and four rows per thread: 8,192 rows are 64 programs, all resident at once.
BLOCK: Final = 128
OPTIONS: Final[dict[str, int | bool]] = {"num_warps": 1, "enable_fp_fusion": False}


@triton.jit(
    do_not_specialize=["num_requests", "num_tokens", "num_rows"],
    # Slices of the engine's buffers have any alignment. It must not trigger a compilation while serving.
    do_not_specialize_on_alignment=["query_start_loc_B1", "idx_mapping_B", "positions_T"],
)
def route_rows_kernel(
    query_start_loc_B1,
    idx_mapping_B,
    positions_T,
    span_S2,
    slot_T,
    pos_T,
    num_requests,
    num_tokens,
    num_rows,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Semantics: for row t < num_tokens, b = the request with query_start_loc[b] <= t < query_start_loc[b + 1]:

        s = idx_mapping[b] + 1,  p = positions[t],  steered = span[s].start <= p < span[s].end
        slot[t], pos[t] = (s, p) if steered else (0, 0)

    and (0, 0) for num_tokens <= t < num_rows. Shapes: query_start_loc int32 [B + 1], idx_mapping int32 [B] (-1 = not
    steered), positions int32 or int64 [T], span int32 [S, 2]. STEPS: 2**STEPS > B. No load goes past B or T.
    """
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    is_token = row < num_tokens
    # Binary search for the first request that ends after the row. It skips requests without rows.
    low = tl.zeros([BLOCK], tl.int32)
    high = low + num_requests
    for _ in range(STEPS):
        middle = (low + high) // 2
        searching = low < high
        end = tl.load(query_start_loc_B1 + middle + 1, mask=is_token & searching, other=0)
        low = tl.where(searching & (end <= row), middle + 1, low)
        high = tl.where(searching & (end > row), middle, high)
    is_token &= low < num_requests
    slot = tl.load(idx_mapping_B + low, mask=is_token, other=-1).to(tl.int32) + 1
    pos = tl.load(positions_T + row, mask=is_token, other=0).to(tl.int32)
    start = tl.load(span_S2 + slot.to(tl.int64) * 2, mask=is_token, other=0)
    end = tl.load(span_S2 + slot.to(tl.int64) * 2 + 1, mask=is_token, other=0)
    steered = is_token & (start <= pos) & (pos < end)
    tl.store(slot_T + row, tl.where(steered, slot, 0), mask=row < num_rows)
    tl.store(pos_T + row, tl.where(steered, pos, 0), mask=row < num_rows)


def route_rows(
    query_start_loc_B1: torch.Tensor,
    idx_mapping_B: torch.Tensor,
    positions_T: torch.Tensor,
    tables: Tables,
    num_tokens: int,
) -> None:
    """Write all of `tables.slot_T` and `tables.pos_T` on the device, without a host sync.

    idx_mapping_B: batch position -> request-state index (slot - 1), or -1 for an unsteered request.
    num_tokens: rows of the batch that are tokens. The other rows of the buffers get slot 0.
    """
    num_requests = idx_mapping_B.shape[0]
    num_rows = tables.slot_T.shape[0]
    assert query_start_loc_B1.shape[0] > num_requests, "query_start_loc needs one element more than idx_mapping"
    assert num_tokens <= min(positions_T.shape[0], num_rows), "more tokens than positions or routing rows"
    # Computed from the number of slots, so that one compiled kernel works for every batch size.
    steps = max(num_requests, tables.span_S2.shape[0]).bit_length()
    route_rows_kernel[(triton.cdiv(num_rows, BLOCK),)](
        query_start_loc_B1,
        idx_mapping_B,
        positions_T,
        tables.span_S2,
        tables.slot_T,
        tables.pos_T,
        num_requests,
        num_tokens,
        num_rows,
        STEPS=steps,
        BLOCK=BLOCK,
        **OPTIONS,
    )
