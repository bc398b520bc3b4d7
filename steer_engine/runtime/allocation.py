"""The device buffers of an engine: allocated in one place, and counted by the same call without a device."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from steer_kernels.tables import Tables

from steer_engine.config import SteeringConfig


def allocate_tables(
    config: SteeringConfig,
    *,
    num_sites: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    max_requests: int,
    max_tokens: int,
    reads: bool,
) -> Tables:
    """Zeroed buffers of an engine with `num_sites` armed blocks, which steer nothing.

    max_tokens: token rows of the largest batch. reads: whether the stream can be read.
    """
    return Tables.allocate(
        num_slots=max_requests + 1,
        num_sites=num_sites,
        num_entries=config.rows,
        num_rows=config.num_bank_rows(num_sites, max_requests),
        hidden_size=hidden_size,
        max_tokens=max_tokens,
        bank_dtype=dtype,
        device=device,
        capture_rows=max_tokens if reads else 0,
    )


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of device memory, on each rank: every rank holds all of it."""

    bank: int
    """Rows of the vectors in use."""
    programs: int
    """What each running request asks."""
    routing: int
    """Whose program applies to which token row of a step."""
    reading: int
    """Where the stream is read to."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    @classmethod
    def of(cls, tables: Tables) -> Footprint:
        return cls(
            bank=tables.bank_RD.nbytes,
            programs=sum(
                part.nbytes for part in (tables.entries_SLEW, tables.counts_SL, tables.keep_norm_S, tables.span_S2)
            ),
            routing=tables.slot_T.nbytes + tables.pos_T.nbytes,
            reading=sum(part.nbytes for part in (tables.capture_T, tables.captured_LCD) if part is not None),
        )
