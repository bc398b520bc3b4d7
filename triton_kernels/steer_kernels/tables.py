"""The persistent buffers that all kernels use, and the binary format of one entry of a program.

Legend: T tokens, S slots, L sites (armed blocks), E entries per site, W words per entry, R bank rows, D hidden size,
C capture rows. An entry is one step of a program at one site:

    x' = x + g(x) * w        g(x) = c0 + c1*|x| + c2*<x,w> + c3*(clip(<x,w>, lo, hi) - <x,w>)

It applies to rows at positions start <= p < end whose cosine with the gate row is in [min_cos, max_cos].
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np
import torch

NUM_WORDS: Final = 16
"""int32 words per entry: 64 bytes, so that an entry never spans two cache lines."""

MAX_POSITION: Final = 2**31 - 1
"""The `end` of an open span. Position 2**31 - 1 itself cannot be edited."""

# An add uses only the first 16 bytes (4 words). Words 12 to 15 are zero.
ROW, START, END, C0, C1, C2, C3, LO, HI, GATE_ROW, GATE_MIN, GATE_MAX = range(12)
_FORMAT: Final = struct.Struct("=3i6fi2f16x")


class Entry(NamedTuple):
    """One step of a program, decoded. Floats are float32 values."""

    row: int
    """Bank row w. Already a unit vector if the operation needs one."""
    start: int = 0
    end: int = MAX_POSITION
    c0: float = 0.0
    c1: float = 0.0
    c2: float = 0.0
    c3: float = 0.0
    lo: float = 0.0
    hi: float = 0.0
    gate_row: int = -1
    """Bank row whose cosine with x is tested; it may have any length. -1 = no gate."""
    min_cos: float = -np.inf
    max_cos: float = np.inf


def encode_entry(entry: Entry) -> np.ndarray:
    """Pack an entry into int32 [W], ready to be copied into `entries_SLEW[slot, site, e]`.

    Raises struct.error or OverflowError if a number does not fit into int32 or float32.
    """
    return np.frombuffer(bytearray(_FORMAT.pack(*entry)), dtype=np.int32)


def decode_entry(words_W: np.ndarray) -> Entry:
    """Unpack what `encode_entry` packed; for tests, logs and introspection."""
    return Entry(*_FORMAT.unpack(np.ascontiguousarray(words_W, dtype=np.int32).tobytes()))


@dataclass(kw_only=True, slots=True)
class Tables:
    """Device buffers at fixed addresses. Their contents change between steps; the tensors are never replaced.

    Slot 0 means "not steered": its counts stay 0 and its span stays (0, 0). All-zero buffers steer nothing.
    """

    bank_RD: torch.Tensor
    """[R, D] rows of the vectors in use, in the model's dtype or float32, contiguous, 16-byte aligned."""
    entries_SLEW: torch.Tensor
    """int32 [S, L, E, W]; see `encode_entry`. Applied in order, each to the row as edited by the entries before it."""
    counts_SL: torch.Tensor
    """int32 [S, L]: how many of the E entries are used; 0 = no edit."""
    keep_norm_S: torch.Tensor
    """int32 [S]: 1 = rescale an edited row to its norm before the edit (ignored with `adds_only`)."""
    span_S2: torch.Tensor
    """int32 [S, 2]: smallest start and largest end of the slot's entries over all sites. Rows outside are routed to
    slot 0, so a `generation` program adds no cost to prompt rows. (0, 0) = the slot has no program."""
    slot_T: torch.Tensor
    """int32 [max tokens]: slot whose program applies to the row; 0 = none. Written by `route_rows`."""
    pos_T: torch.Tensor
    """int32 [max tokens]: absolute position of the row's token; 0 on unsteered rows."""
    capture_T: torch.Tensor | None = None
    """int32 [max tokens]: 0 = not captured; k = store x before the edit in captured_LCD[site, k - 1]; -k = store x
    after the edit there."""
    captured_LCD: torch.Tensor | None = None
    """[L, C, D]: captured rows, in float32 or the model's dtype, contiguous, 16-byte aligned."""

    @classmethod
    def allocate(
        cls,
        *,
        num_slots: int,
        num_sites: int,
        num_entries: int,
        num_rows: int,
        hidden_size: int,
        max_tokens: int,
        bank_dtype: torch.dtype,
        device: torch.device | str = "cpu",
        capture_rows: int = 0,
        capture_dtype: torch.dtype = torch.float32,
    ) -> Tables:
        """Zeroed buffers, which steer and capture nothing. `num_slots` includes slot 0."""

        def int32(*shape: int) -> torch.Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        captured = torch.zeros(num_sites, capture_rows, hidden_size, dtype=capture_dtype, device=device)
        return cls(
            bank_RD=torch.zeros(num_rows, hidden_size, dtype=bank_dtype, device=device),
            entries_SLEW=int32(num_slots, num_sites, num_entries, NUM_WORDS),
            counts_SL=int32(num_slots, num_sites),
            keep_norm_S=int32(num_slots),
            span_S2=int32(num_slots, 2),
            slot_T=int32(max_tokens),
            pos_T=int32(max_tokens),
            capture_T=int32(max_tokens) if capture_rows else None,
            captured_LCD=captured if capture_rows else None,
        )
