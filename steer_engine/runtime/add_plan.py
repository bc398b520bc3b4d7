"""What a step adds where, worked out once a step for all sites: the quick way of a CPU engine.

Without a device queue the host may look at the routing buffers. When every steered row of a step only adds, a site
needs three torch calls on the steered rows; anything else goes through the reference. Both round alike, bit for bit:
whether a neighbour needs more than adds cannot be seen in a row that does not.

Legend: N steered rows, L sites, E entries a site, T rows of the batch, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from steer_kernels import tables as tb
from steer_kernels.reference import rows_view
from steer_kernels.tables import Tables


@dataclass(frozen=True, kw_only=True)
class AddPlan:
    """Bank rows and factors per site, for the steered rows of one step."""

    rows_N: torch.Tensor
    """int64: which rows of the batch are steered."""
    all_rows: bool
    """Whether these are all rows of the batch, in order."""
    bank_row_LEN: torch.Tensor
    scale_LEN1: torch.Tensor
    """float32; 0 where an entry does not apply."""
    entries_at_L: list[list[int]]
    """Per site, the entries that apply to any row."""

    @classmethod
    def of_step(cls, tables: Tables, rows_N: torch.Tensor, num_tokens: int) -> AddPlan:
        slot_N = tables.slot_T[rows_N].long()
        # The first four words are all that an add needs.
        words_NLE4 = tables.entries_SLEW[..., : tb.C0 + 1][slot_N]
        pos_N11 = tables.pos_T[rows_N].view(-1, 1, 1)
        applies_NLE = (words_NLE4[..., tb.START] <= pos_N11) & (pos_N11 < words_NLE4[..., tb.END])
        scale_NLE = words_NLE4[..., tb.C0].contiguous().view(torch.float32) * applies_NLE
        return cls(
            rows_N=rows_N,
            all_rows=rows_N.shape[0] == num_tokens,
            bank_row_LEN=words_NLE4[..., tb.ROW].permute(1, 2, 0).contiguous().long(),
            scale_LEN1=scale_NLE.permute(1, 2, 0).contiguous().unsqueeze(-1),
            entries_at_L=[[e for e, used in enumerate(used_E) if used] for used_E in applies_NLE.any(0).tolist()],
        )

    def apply(self, carried: torch.Tensor, bank_RD: torch.Tensor, site: int) -> None:
        """Edit `carried` [..., T, D] in place."""
        entries = self.entries_at_L[site]
        if not entries:
            return
        delta_ND = self._delta(bank_RD, site, entries[0])
        for e in entries[1:]:
            delta_ND += self._delta(bank_RD, site, e)
        carried_TD = rows_view(carried)
        if carried_TD.dtype == torch.float32:
            if self.all_rows and carried_TD.shape[0] == delta_ND.shape[0]:
                carried_TD += delta_ND
            else:
                carried_TD.index_add_(0, self.rows_N, delta_ND)
        else:
            carried_TD[self.rows_N] = (carried_TD[self.rows_N].float() + delta_ND).to(carried_TD.dtype)

    def _delta(self, bank_RD: torch.Tensor, site: int, e: int) -> torch.Tensor:
        rows_ND = bank_RD.index_select(0, self.bank_row_LEN[site, e])
        return rows_ND.float().mul_(self.scale_LEN1[site, e])
