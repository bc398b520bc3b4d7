"""Edits of a step on a CPU that need the whole algebra: entries with a gate or a mode, rows that keep their norm.

Which entries apply to which rows is planned once for all sites; at each site that has such an entry, all of its edits
are made as the reference makes them.

Legend: see `cpu_plan`; M steered rows that have an entry at the site.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steer_kernels import tables as tb
from steer_kernels.algebra import change_of
from steer_kernels.cpu_probes import SiteProbes
from steer_kernels.reference import rows_view, stream_rows
from steer_kernels.shares import field


@dataclass(frozen=True, kw_only=True)
class FullEdits:
    """All edits of one site."""

    at_M: torch.Tensor
    """The rows in the batch."""
    among_M: torch.Tensor
    """The same rows among the steered rows."""
    words_MEW: torch.Tensor
    share_ME: torch.Tensor
    keep_norm_M: torch.Tensor

    def apply(
        self,
        hidden: torch.Tensor | None,
        carried_TD: torch.Tensor,
        bank_RD: torch.Tensor,
        probes: SiteProbes | None,
        num_steered: int,
    ) -> None:
        """Edit `carried_TD` in place, and write what the site's probes measure in all steered rows."""
        hidden_TD = None if hidden is None else rows_view(hidden)
        x_MD = stream_rows(hidden_TD, carried_TD, self.at_M)
        delta_MD, touched_M = change_of(x_MD, self.words_MEW, self.share_ME, bank_RD, self.keep_norm_M, None)
        if probes is not None:
            delta_ND = delta_MD.new_zeros(num_steered, delta_MD.shape[1])
            probes.write(hidden, carried_TD, delta_ND.index_copy_(0, self.among_M, delta_MD), bank_RD)
        at_M = self.at_M
        if not bool(touched_M.all()):
            at_M, delta_MD = at_M[touched_M], delta_MD[touched_M]
        carried_TD[at_M] = (carried_TD[at_M].float() + delta_MD).to(carried_TD.dtype)


def take_full(
    words_NLEW: torch.Tensor, share_NLE: torch.Tensor, rows_N: torch.Tensor, keep_norm_N: torch.Tensor
) -> tuple[dict[int, FullEdits] | None, torch.Tensor]:
    """The edits of the sites at which an entry that applies has a gate or a mode, or its row keeps its norm, by their
    place in L; and the shares without theirs. None instead of the edits = no entry is of that kind, at any position.

    words_NLEW and keep_norm_N may have a single row for all of share_NLE. Probes have been taken out: their share is 0.
    """
    when_NLE = words_NLEW[..., tb.WHEN]
    is_probe_NLE = (words_NLEW[..., tb.START] < 0) & (field(when_NLE, tb.PROBE) != 0)
    has_mode_NLE = (words_NLEW[..., tb.START] < 0) & (field(when_NLE, tb.MODE) != 0)
    is_full_NLE = (words_NLEW[..., tb.GATE_ROW] >= 0) | has_mode_NLE | (keep_norm_N != 0).view(-1, 1, 1)
    is_full_NLE &= (words_NLEW[..., tb.END] > 0) & ~is_probe_NLE
    if not bool(is_full_NLE.any()):
        return None, share_NLE
    applies_NLE = share_NLE != 0
    places = (is_full_NLE & applies_NLE).any(2).any(0).nonzero().squeeze(1).tolist()
    num_rows = share_NLE.shape[0]
    words_NLEW, keep_norm_N = words_NLEW.expand(num_rows, -1, -1, -1), keep_norm_N.expand(num_rows)
    edits = {}
    for place in places:
        among_M = applies_NLE[:, place].any(1).nonzero().squeeze(1)
        words_MEW = words_NLEW[among_M, place]
        # What does not apply has no gate: a probe that was taken out has another number in that word.
        words_MEW[..., tb.GATE_ROW].masked_fill_(~applies_NLE[among_M, place], -1)
        edits[place] = FullEdits(
            at_M=rows_N[among_M],
            among_M=among_M,
            words_MEW=words_MEW,
            share_ME=share_NLE[among_M, place],
            keep_norm_M=keep_norm_N[among_M],
        )
    share_NLE = share_NLE.clone()
    share_NLE[:, places] = 0.0
    return edits, share_NLE
