"""The probes of a step on a CPU: planned once for all sites, with a few torch calls at each site that has any.

Numbers are those of the reference, bit for bit: a sum over D is made row by row, so it does not depend on other rows.

Legend: see `cpu_plan`. P pairs of a row and a probe that applies to it, K columns of `probed_TK`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steer_kernels import tables as tb
from steer_kernels.reference import rows_view
from steer_kernels.shares import field, probe_columns
from steer_kernels.tables import Tables

MAX_PAIR_NUMBERS = 2**18
"""Most float32 numbers of bank rows that are copied for pairs at once (1 MiB), so that they stay in the cache, and that
a plan keeps for all sites."""


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """The probes of one site that are all late, or all early: U rows with M probes each."""

    at_U: torch.Tensor
    """The rows in the batch."""
    steered_U: torch.Tensor
    """The same rows among the steered rows."""
    row_UM: torch.Tensor
    """Bank rows."""
    place_UM: torch.Tensor
    """Places in the flat `probed_TK`."""
    is_cosine_UM: torch.Tensor | None
    """None = no pair measures the cosine."""
    gathered_UMD: torch.Tensor | None
    """The bank rows as float32; None = not gathered, look them up in every step."""

    def write(
        self,
        hidden_TD: torch.Tensor | None,
        carried_TD: torch.Tensor,
        delta_ND: torch.Tensor | None,
        bank_RD: torch.Tensor,
        probed_TK: torch.Tensor,
    ) -> None:
        """Measure x + delta in every pair. delta_ND: [N or 1, D], or None for x as it is."""
        size = max(1, MAX_PAIR_NUMBERS // (self.row_UM.shape[1] * carried_TD.shape[1]))
        for first in range(0, len(self.at_U), size):
            chosen = slice(first, first + size)
            number_UM = self._numbers(chosen, hidden_TD, carried_TD, delta_ND, bank_RD)
            probed_TK.view(-1).index_copy_(0, self.place_UM[chosen].flatten(), number_UM.flatten())

    def _numbers(
        self,
        chosen: slice,
        hidden_TD: torch.Tensor | None,
        carried_TD: torch.Tensor,
        delta_ND: torch.Tensor | None,
        bank_RD: torch.Tensor,
    ) -> torch.Tensor:
        at_U = self.at_U[chosen]
        x_UD = carried_TD.index_select(0, at_U).float()
        if hidden_TD is not None:
            x_UD = hidden_TD.index_select(0, at_U).float() + x_UD
        if delta_ND is not None:
            shared = delta_ND.shape[0] == 1
            x_UD = x_UD + (delta_ND if shared else delta_ND.index_select(0, self.steered_U[chosen]))
        row_UMD = bank_rows(bank_RD, self.row_UM[chosen]) if self.gathered_UMD is None else self.gathered_UMD[chosen]
        dot_UM = (x_UD.unsqueeze(1) * row_UMD).sum(2)
        if self.is_cosine_UM is None:
            return dot_UM
        size_UM = x_UD.norm(dim=1, keepdim=True) * row_UMD.norm(dim=2)
        cosine_UM = torch.where(size_UM > 0, dot_UM / size_UM, 0.0)
        return torch.where(self.is_cosine_UM[chosen], cosine_UM, dot_UM)


def bank_rows(bank_RD: torch.Tensor, row_UM: torch.Tensor) -> torch.Tensor:
    """float32 [U, M, D]."""
    return bank_RD.index_select(0, row_UM.flatten()).view(*row_UM.shape, -1).float()


@dataclass(frozen=True, kw_only=True)
class SiteProbes:
    """The probes of one site."""

    early: Pairs | None
    late: Pairs | None
    probed_TK: torch.Tensor

    def write(
        self,
        hidden: torch.Tensor | None,
        carried_TD: torch.Tensor,
        delta_ND: torch.Tensor | None,
        bank_RD: torch.Tensor,
    ) -> None:
        """Write all numbers of the site, before the edit is stored. delta_ND: the edit, or None if there is none."""
        hidden_TD = None if hidden is None else rows_view(hidden)
        if self.early is not None:
            self.early.write(hidden_TD, carried_TD, None, bank_RD, self.probed_TK)
        if self.late is not None:
            self.late.write(hidden_TD, carried_TD, delta_ND, bank_RD, self.probed_TK)


def take_probes(
    tables: Tables, words_NLEW: torch.Tensor, share_NLE: torch.Tensor, rows_N: torch.Tensor
) -> tuple[dict[int, SiteProbes], torch.Tensor, torch.Tensor]:
    """The probes by site, and the words and shares of the other entries, in order.

    words_NLEW may have a single row for all of share_NLE. Probes take no place among the other entries, so that edits
    at other sites cost what they cost without probes; a shorter list is filled up with entries of share 0.
    """
    probed_TK = tables.probed_TK
    column_NLE = probe_columns(words_NLEW)
    is_probe_NLE = column_NLE >= 0
    if probed_TK is None or not bool(is_probe_NLE.any()):
        return {}, words_NLEW, share_NLE
    n_P, site_P, e_P = (is_probe_NLE & (share_NLE != 0)).nonzero().unbind(1)
    single = words_NLEW.shape[0] == 1
    words_PW = words_NLEW[torch.zeros_like(n_P) if single else n_P, site_P, e_P]
    _assert_early_ones_first(is_probe_NLE, words_NLEW, share_NLE)
    late_P = field(words_PW[:, tb.WHEN], tb.LATE)
    order_P = (2 * site_P + late_P).argsort(stable=True)
    counts = torch.bincount(2 * site_P + late_P, minlength=2 * words_NLEW.shape[1]).tolist()
    keeps_rows = len(n_P) * tables.bank_RD.shape[1] <= MAX_PAIR_NUMBERS
    pairs: list[Pairs | None] = []
    for chosen_P in torch.split(order_P, counts):
        if not len(chosen_P):
            pairs.append(None)
            continue
        words_CW, n_C = words_PW[chosen_P], n_P[chosen_P]
        shape = _rows_and_probes(n_C)
        is_cosine_C = field(words_CW[:, tb.WHEN], tb.MEASURE) == tb.COSINE
        at_C, row_UM = rows_N[n_C], words_CW[:, tb.ROW].long().view(shape)
        group = Pairs(
            at_U=at_C.view(shape)[:, 0],
            steered_U=n_C.view(shape)[:, 0],
            row_UM=row_UM,
            place_UM=(at_C * probed_TK.shape[1] + words_CW[:, tb.PROBE_COLUMN]).view(shape),
            is_cosine_UM=is_cosine_C.view(shape) if bool(is_cosine_C.any()) else None,
            gathered_UMD=bank_rows(tables.bank_RD, row_UM) if keeps_rows else None,
        )
        pairs.append(group)
    sites = {
        site: SiteProbes(early=early, late=late, probed_TK=probed_TK)
        for site, (early, late) in enumerate(zip(pairs[::2], pairs[1::2], strict=True))
        if early is not None or late is not None
    }
    return sites, *_without_probes(is_probe_NLE, words_NLEW, share_NLE)


def _rows_and_probes(n_C: torch.Tensor) -> tuple[int, int]:
    """U and M of pairs in the order of their rows. If all rows have as many probes, each row is read once for all."""
    num_probes = int((n_C == n_C[0]).sum())
    if len(n_C) % num_probes == 0 and bool((n_C.view(-1, num_probes) == n_C[::num_probes].unsqueeze(1)).all()):
        return len(n_C) // num_probes, num_probes
    return len(n_C), 1


def _without_probes(
    is_probe_NLE: torch.Tensor, words_NLEW: torch.Tensor, share_NLE: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    # An entry without a span is behind the last one of a shorter list, or can never apply.
    kept_NLE = ~is_probe_NLE & (words_NLEW[..., tb.END] > 0)
    order_NLE = (~kept_NLE).int().argsort(dim=2, stable=True)[:, :, : max(1, int(kept_NLE.sum(2).max()))]
    words_NLEW = words_NLEW.gather(2, order_NLE.unsqueeze(-1).expand(-1, -1, -1, words_NLEW.shape[-1]))
    share_NLE = share_NLE.masked_fill(is_probe_NLE, 0.0)
    return words_NLEW, share_NLE.gather(2, order_NLE.expand(share_NLE.shape[0], -1, -1))


def _assert_early_ones_first(is_probe_NLE: torch.Tensor, words_NLEW: torch.Tensor, share_NLE: torch.Tensor) -> None:
    early_NLE = is_probe_NLE & (share_NLE != 0) & (field(words_NLEW[..., tb.WHEN], tb.LATE) == 0)
    edits_NLE = ~is_probe_NLE & (share_NLE != 0)
    assert not bool((early_NLE & (edits_NLE.cumsum(2) > 0)).any()), "an early probe stands behind an edit"
