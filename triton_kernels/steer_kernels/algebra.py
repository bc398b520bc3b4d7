"""What the entries of a program do to rows of the stream, in plain torch: every operation, gate, group and kept norm.

Legend: see `tables`. N rows; `share_NE` says by how much each entry applies to each row (see `shares`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steer_kernels import tables as tb
from steer_kernels.shares import cosine, field, probe_columns
from steer_kernels.tables import Tables


@dataclass(frozen=True, kw_only=True)
class Probes:
    """The probes among the entries of the selected rows."""

    words_NEW: torch.Tensor
    column_NE: torch.Tensor
    """int32; -1 = no probe, or one that does not apply to the row."""
    rows_N: torch.Tensor
    tables: Tables

    @classmethod
    def take(
        cls, words_NEW: torch.Tensor, share_NE: torch.Tensor, rows_N: torch.Tensor, tables: Tables
    ) -> tuple[Probes, torch.Tensor]:
        """The probes, and the shares without theirs. Their columns are removed from words_NEW, where gates are."""
        column_NE = probe_columns(words_NEW)
        is_probe_NE = column_NE >= 0
        words_NEW[..., tb.GATE_ROW].masked_fill_(is_probe_NE, -1)
        applies_NE = is_probe_NE & (share_NE != 0)
        probes = cls(
            words_NEW=words_NEW, column_NE=torch.where(applies_NE, column_NE, -1), rows_N=rows_N, tables=tables
        )
        return probes, share_NE.masked_fill(is_probe_NE, 0.0)

    def write(self, e: int, x_ND: torch.Tensor, *, late: bool) -> None:
        """The numbers of entry `e` in x, for the rows in which it is a probe that is `late` or not."""
        assert self.tables.probed_TK is not None
        when_N = self.words_NEW[:, e, tb.WHEN]
        mine_N = (self.column_NE[:, e] >= 0) & (field(when_N, tb.LATE) == late)
        for kind in (tb.DOT, tb.COSINE):
            here_N = (mine_N & (field(when_N, tb.MEASURE) == kind)).nonzero().squeeze(1)
            if here_N.numel():
                row_ND = self.tables.bank_RD[self.words_NEW[here_N, e, tb.ROW].long()].float()
                number_N = cosine(x_ND[here_N], row_ND) if kind == tb.COSINE else (x_ND[here_N] * row_ND).sum(1)
                self.tables.probed_TK[self.rows_N[here_N], self.column_NE[here_N, e].long()] = number_N


def change_of(
    x_ND: torch.Tensor,
    words_NEW: torch.Tensor,
    share_NE: torch.Tensor,
    bank_RD: torch.Tensor,
    keep_norm_N: torch.Tensor,
    probes: Probes | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """All operations, gates, kept norms, probes. Returns x' - x as float32 [N, D], and bool [N]: an entry applied."""
    delta_ND = torch.zeros_like(x_ND)
    touched_N = share_NE[:, 0] < 0  # no row
    group_ND, in_group_N = delta_ND, touched_N
    for e in range(share_NE.shape[1]):
        words_NW = words_NEW[:, e]
        now_ND = x_ND + delta_ND
        parallel_N = _detail(words_NW, tb.PARALLEL)
        if bool(parallel_N.any()):
            # The first entry of a group keeps what the rest of the group reads.
            first_N = (parallel_N != 0) & ~in_group_N
            group_ND = torch.where(first_N.unsqueeze(1), delta_ND, group_ND)
            now_ND = torch.where((parallel_N != 0).unsqueeze(1), x_ND + group_ND, now_ND)
        in_group_N = parallel_N == tb.MEMBER
        if probes is not None:
            probes.write(e, now_ND, late=False)
        applies_N = (share_NE[:, e] != 0) & _gate(now_ND, words_NW, bank_RD)
        w_ND = bank_RD[words_NW[:, tb.ROW].long()].float()
        g_N = _factor(now_ND, w_ND, words_NW, share_NE[:, e], bank_RD)
        delta_ND = delta_ND + torch.where(applies_N, g_N, 0.0).unsqueeze(1) * w_ND
        touched_N = touched_N | applies_N
    keep_N = (keep_norm_N != 0) & touched_N
    if bool(keep_N.any()):
        edited_ND = x_ND + delta_ND
        norm_N = edited_ND.norm(dim=1)
        ratio_N = torch.where(norm_N > 0, x_ND.norm(dim=1) / norm_N, 1.0)
        delta_ND = torch.where(keep_N.unsqueeze(1), edited_ND * ratio_N.unsqueeze(1) - x_ND, delta_ND)
    if probes is not None:
        for e in range(share_NE.shape[1]):
            probes.write(e, x_ND + delta_ND, late=True)
    return delta_ND, touched_N


def _detail(words_NW: torch.Tensor, place: tuple[int, int]) -> torch.Tensor:
    """int32 [N]: a bit field of WHEN; 0 for an entry without details."""
    return torch.where(words_NW[:, tb.START] < 0, field(words_NW[:, tb.WHEN], place), 0)


def _factor(
    x_ND: torch.Tensor, w_ND: torch.Tensor, words_NW: torch.Tensor, share_N: torch.Tensor, bank_RD: torch.Tensor
) -> torch.Tensor:
    """float32 [N]: share * g(x)."""
    c0, c1, c2, c3 = (words_NW[:, tb.C0 : tb.C3 + 1].view(torch.float32) * share_N.unsqueeze(1)).unbind(1)
    lo, hi = words_NW[:, tb.LO : tb.HI + 1].view(torch.float32).unbind(1)
    mode_N = _detail(words_NW, tb.MODE)
    reads_N = mode_N != 0
    dot_N = own_N = (x_ND * w_ND).sum(1)
    if bool(reads_N.any()):
        row_N = torch.where(reads_N, words_NW[:, tb.READ_ROW], 0).long()
        dot_N = torch.where(reads_N, (x_ND * bank_RD[row_N].float()).sum(1), own_N)
    length_N = c1 * x_ND.norm(dim=1)
    clipped_N = torch.minimum(torch.maximum(dot_N, lo), hi)
    g_N = c0 + torch.where(reads_N, 0.0, length_N) + c2 * dot_N + c3 * (clipped_N - dot_N)
    if bool((mode_N == tb.JUMP).any()):
        inside_N = (lo <= dot_N) & (dot_N <= hi)
        g_N = torch.where(mode_N == tb.JUMP, c0 + torch.where(inside_N, c2 * dot_N + c3, 0.0), g_N)
    if bool((mode_N == tb.PLANE).any()):
        length_N = (own_N * own_N + dot_N * dot_N).sqrt()
        g_N = torch.where(mode_N == tb.PLANE, c0 * length_N + c2 * own_N + c3 * dot_N, g_N)
    return g_N


def _gate(x_ND: torch.Tensor, words_NW: torch.Tensor, bank_RD: torch.Tensor) -> torch.Tensor:
    """bool [N]: the cosine, or the dot product, of x and the gate row is within the bounds, or there is no gate.

    If a row is zero, the cosine is 0.
    """
    row_N = words_NW[:, tb.GATE_ROW]
    open_N = row_N < 0
    if bool(open_N.all()):
        return open_N
    low_N, high_N = words_NW[:, tb.GATE_MIN : tb.GATE_MAX + 1].view(torch.float32).unbind(1)
    gate_ND = bank_RD[row_N.clamp(min=0).long()].float()
    number_N = torch.where(_detail(words_NW, tb.GATE_DOT) != 0, (x_ND * gate_ND).sum(1), cosine(x_ND, gate_ND))
    return open_N | ((number_N >= low_N) & (number_N <= high_N))
