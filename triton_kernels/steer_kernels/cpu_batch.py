"""The batch of a step on a CPU: which part of the tables it uses, and for how long its plan is valid.

Legend: see `cpu_plan`.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from steer_kernels import tables as tb
from steer_kernels.tables import MAX_POSITION, Tables


@dataclass(frozen=True, kw_only=True)
class Used:
    """The part of the programs' tables that a batch uses."""

    sites_L: torch.Tensor
    num_entries: int

    @classmethod
    def of_batch(cls, tables: Tables, idx_mapping_B: torch.Tensor) -> Used:
        counts_BL = tables.counts_SL[(idx_mapping_B + 1).long()]
        return cls(sites_L=counts_BL.any(0).nonzero().squeeze(1), num_entries=max(1, int(counts_BL.max())))

    def words(self, tables: Tables, slot_N: torch.Tensor, first: int = 0, last: int = tb.NUM_WORDS - 1) -> torch.Tensor:
        """int32 [N, L, E, last + 1 - first]: a copy of these words of all entries."""
        some_SLEW = tables.entries_SLEW[:, :, : self.num_entries, first : last + 1]
        if len(self.sites_L) == some_SLEW.shape[1]:
            return some_SLEW[slot_N]
        return some_SLEW[slot_N.unsqueeze(1), self.sites_L]


@dataclass(frozen=True, kw_only=True)
class Decoding:
    """A batch with exactly one row per request, and for each request the positions [since, until) for which its plan
    is valid: no entry of its program begins or ends between them, and its triggers' windows are the same. A new program
    in a slot also invalidates the plan.
    """

    query_start_loc_B1: np.ndarray
    idx_mapping_B: np.ndarray
    since_B: np.ndarray
    until_B: np.ndarray
    with_triggers: np.ndarray
    """The rows of requests with triggers, and their windows."""
    windows: np.ndarray

    @classmethod
    def of_step(
        cls,
        tables: Tables,
        used: Used,
        query_start_loc_B1: torch.Tensor,
        idx_mapping_B: torch.Tensor,
        positions_B: torch.Tensor,
    ) -> Decoding | None:
        """The batch of this step, or None if a request has no row or several."""
        num_requests = idx_mapping_B.shape[0]
        if positions_B.shape[0] != num_requests or bool((query_start_loc_B1.diff() != 1).any()):
            return None
        # Include requests outside their program's span: they are not routed now, but will be when they enter it.
        slot_B = (idx_mapping_B + 1).long()
        bounds_BX = used.words(tables, slot_B, tb.START, tb.END).flatten(1) & MAX_POSITION
        passed_BX = bounds_BX <= positions_B.unsqueeze(1)
        with_triggers = tables.num_triggers_S[slot_B].nonzero().squeeze(1).numpy()
        return cls(
            query_start_loc_B1=query_start_loc_B1.numpy().copy(),
            idx_mapping_B=idx_mapping_B.numpy().copy(),
            since_B=torch.where(passed_BX, bounds_BX, 0).amax(1).numpy(),
            until_B=torch.where(passed_BX, MAX_POSITION, bounds_BX).amin(1).numpy(),
            with_triggers=with_triggers,
            windows=tables.windows_TJ.numpy()[with_triggers],
        )

    def continues(
        self,
        query_start_loc_B1: torch.Tensor,
        idx_mapping_B: torch.Tensor,
        positions_B: torch.Tensor,
        windows_TJ: torch.Tensor,
    ) -> bool:
        """Whether the plan of this batch is also valid for the given step, whose triggers have been advanced."""
        # Runs in every step, with cold caches: numpy calls take half as long as torch calls.
        if idx_mapping_B.shape[0] != len(self.idx_mapping_B) or positions_B.shape[0] != len(self.since_B):
            return False
        at_B = positions_B.numpy()
        return bool(
            (self.idx_mapping_B == idx_mapping_B.numpy()).all()
            and (self.query_start_loc_B1 == query_start_loc_B1.numpy()).all()
            and (self.since_B <= at_B).all()
            and (at_B < self.until_B).all()
            and (not len(self.windows) or np.array_equal(self.windows, windows_TJ.numpy()[self.with_triggers]))
        )

    def not_before(self, rows_N: torch.Tensor, position_N: np.ndarray | None) -> None:
        """The plan is not valid in these rows before these positions, if there are any."""
        if position_N is not None:
            rows = rows_N.numpy()
            self.since_B[rows] = np.maximum(self.since_B[rows], position_N)
