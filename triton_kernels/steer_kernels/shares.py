"""The share of each entry in each row, and what entries measure, in plain torch. See `details` for the kernels' form.

Legend: see `tables`. N selected rows. A CPU engine runs this too, so it depends on nothing but the tables.
"""

from __future__ import annotations

import numpy as np
import torch

from steer_kernels import tables as tb
from steer_kernels.tables import Tables


def field(when: torch.Tensor, place: tuple[int, int]) -> torch.Tensor:
    """A bit field of WHEN."""
    first, bits = place
    return (when >> first) & ((1 << bits) - 1)


def covers(words_NEW: torch.Tensor, pos_N: torch.Tensor) -> torch.Tensor:
    """bool [N, E]: start <= p < end."""
    pos_N1 = pos_N.view(-1, *[1] * (words_NEW.dim() - 2))
    return ((words_NEW[..., tb.START] & tb.MAX_POSITION) <= pos_N1) & (pos_N1 < words_NEW[..., tb.END])


def have_details(words_NEW: torch.Tensor) -> bool:
    """Whether any entry has details."""
    return bool((words_NEW[..., tb.START] < 0).any())


def probe_columns(words_NEW: torch.Tensor) -> torch.Tensor:
    """int32 [N, ..., E]: the column of `probed_TK` that each entry writes; -1 = it is no probe."""
    is_probe_NE = (words_NEW[..., tb.START] < 0) & (field(words_NEW[..., tb.WHEN], tb.PROBE) != 0)
    return torch.where(is_probe_NE, words_NEW[..., tb.PROBE_COLUMN], -1)


def cosine(x_ND: torch.Tensor, row_ND: torch.Tensor) -> torch.Tensor:
    """float32 [N]: cos(x, row); 0 if either is zero."""
    size_N = x_ND.norm(dim=1) * row_ND.norm(dim=1)
    return torch.where(size_N > 0, (x_ND * row_ND).sum(1) / size_N, 0.0)


def shares_of(
    words_NEW: torch.Tensor, pos_N: torch.Tensor, windows_NJ: torch.Tensor, slot_N: torch.Tensor, tables: Tables
) -> torch.Tensor:
    """float32 [N, ..., E]: by how much each entry applies to its row: 1 without details, 0 = not at all.

    Probes have a share too, which says whether they write. An entry that measures for a condition has none.
    words_NEW: [N, ..., E, W]. windows_NJ: the rows' part of `windows_TJ`. slot_N: their slots.
    """
    lead = (-1, *[1] * (words_NEW.dim() - 2))
    pos_N1 = pos_N.view(lead)
    detailed_NE = words_NEW[..., tb.START] < 0
    when_NE = words_NEW[..., tb.WHEN]
    # Window 0 stands for "no trigger"; entries of other rows may hold anything there.
    windows_NE = torch.nn.functional.pad(windows_NJ, (1, 0))
    trigger_NE, exclude_NE = field(when_NE, tb.TRIGGER), field(when_NE, tb.EXCEPT)
    window_NE = _pick(windows_NE, trigger_NE)
    excluded_NE = (exclude_NE > 0) & (_pick(windows_NE, exclude_NE) <= pos_N1)
    inside_NE = (trigger_NE == 0) | (window_NE <= pos_N1)
    counts_NE = (field(when_NE, tb.MEASURE) == 0) | (field(when_NE, tb.PROBE) != 0)
    share_NE = (inside_NE & ~excluded_NE & counts_NE).float()
    over_NE = words_NEW[..., tb.OVER]
    if bool((over_NE > 0).any()):
        since_NE = (pos_N1 - first_positions(words_NEW, windows_NJ)).clamp(min=0)
        now_NE = _scheduled(words_NEW, since_NE)
        share_NE = torch.where((over_NE > 0) & (share_NE != 0), share_NE * now_NE, share_NE)
    asked_NE = field(when_NE, tb.CONDITIONS)
    if bool((asked_NE != 0).any()):
        held_N = _held(slot_N, tables).view(lead)
        any_NE = field(when_NE, tb.ANY) != 0
        enough_NE = torch.where(any_NE, (asked_NE & held_N) != 0, (asked_NE & ~held_N) == 0)
        share_NE = share_NE * (enough_NE | (asked_NE == 0))
    return torch.where(detailed_NE, share_NE, 1.0)


def scheduled(
    slope: np.ndarray, since: np.ndarray, ended: np.ndarray, to: np.ndarray, exponential: np.ndarray | None
) -> np.ndarray:
    """float32: the share of schedules that began `since` tokens ago. All have one shape.

    exponential: bool; None = all are linear.
    """
    change = slope * since.astype(np.float32)
    now = change + np.float32(1.0)
    if exponential is not None:
        # Not torch.exp2: it rounds the last elements of a tensor by another rule than the others, so that a row would
        # depend on its place in the batch.
        power = np.where(exponential & ~ended, change, 0.0).astype(np.float64)
        now = np.where(exponential, np.exp2(power).astype(np.float32), now)
    return np.where(ended, to, now)


def first_positions(words_NEW: torch.Tensor, windows_NJ: torch.Tensor) -> torch.Tensor:
    """int32 [N, ..., E]: where the entry begins: its start, or that of its trigger's window (MAX_POSITION = closed)."""
    trigger_NE = field(words_NEW[..., tb.WHEN], tb.TRIGGER)
    window_NE = _pick(torch.nn.functional.pad(windows_NJ, (1, 0)), trigger_NE)
    return torch.where(trigger_NE > 0, window_NE, words_NEW[..., tb.START] & tb.MAX_POSITION)


def add_measured(number_N: torch.Tensor, when_N: torch.Tensor, slot_N: torch.Tensor, tables: Tables) -> None:
    """Add each row's number to a condition of its slot, or keep the largest. number_N: float32."""
    number_N = number_N.double()
    place_N = slot_N * tb.MAX_CONDITIONS + field(when_N, tb.TOTAL)
    largest_N = field(when_N, tb.LARGEST) != 0
    total_X = tables.measured_SQ.view(-1)
    total_X.index_add_(0, place_N[~largest_N], number_N[~largest_N])
    total_X.scatter_reduce_(0, place_N[largest_N], number_N[largest_N], "amax")


def _scheduled(words_NEW: torch.Tensor, since_NE: torch.Tensor) -> torch.Tensor:
    """`scheduled` for entries, wherever they are."""
    words, since = words_NEW.cpu().numpy(), since_NE.cpu().numpy()
    slope, to = (np.ascontiguousarray(words[..., word]).view(np.float32) for word in (tb.SLOPE, tb.TO))
    exponential = (words[..., tb.WHEN] >> tb.EXPONENTIAL[0] & 1) != 0
    now = scheduled(slope, since, since >= words[..., tb.OVER], to, exponential if exponential.any() else None)
    return torch.from_numpy(now).to(words_NEW.device)


def _held(slot_N: torch.Tensor, tables: Tables) -> torch.Tensor:
    """int32 [N]: bit q is set if condition q of the row's slot holds."""
    number_NQ, bounds_NQ2 = tables.measured_SQ[slot_N], tables.bounds_SQ2[slot_N]
    holds_NQ = (bounds_NQ2[..., 0] < number_NQ) & (number_NQ < bounds_NQ2[..., 1])
    weight_Q = 1 << torch.arange(tb.MAX_CONDITIONS, dtype=torch.int32, device=slot_N.device)
    return (holds_NQ * weight_Q).sum(1, dtype=torch.int32)


def _pick(values_NJ: torch.Tensor, index_NE: torch.Tensor) -> torch.Tensor:
    """values[n, index[n, ...]]"""
    flat_NX = index_NE.reshape(index_NE.shape[0], -1).long()
    values_NJ = values_NJ.expand(max(values_NJ.shape[0], flat_NX.shape[0]), -1)
    flat_NX = flat_NX.expand(values_NJ.shape[0], -1)
    return values_NJ.gather(1, flat_NX).view(-1, *index_NE.shape[1:])
