"""Plain-torch versions of the kernels. Tests compare the kernels with them, and a CPU engine runs them.

Legend: see `tables`. N = rows selected from the T rows of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steer_kernels import tables as tb
from steer_kernels.shares import add_measured, cosine, covers, field, have_details, probe_columns, shares_of
from steer_kernels.tables import Tables


def rows_view(stream: torch.Tensor) -> torch.Tensor:
    """View [..., T, D] as [T, D]. Leading dimensions must be 1: the Transformers backend uses [1, T, D]."""
    assert stream.numel() == stream.shape[-2] * stream.shape[-1], (
        f"expected one row per token, got {tuple(stream.shape)}"
    )
    while stream.dim() > 2:
        stream = stream[0]
    return stream


def edit_residual_reference(
    hidden: torch.Tensor | None,
    carried: torch.Tensor,
    tables: Tables,
    site: int,
    *,
    adds_only: bool,
    capture: bool = False,
    rows_N: torch.Tensor | None = None,
) -> None:
    """Edit `carried` [..., T, D] in place, as `edit_residual` does. x = hidden + carried, or carried alone.

    rows_N: the rows with slot_T != 0, if the caller has computed them (once per step instead of once per site).
    """
    carried_TD = rows_view(carried)
    hidden_TD = None if hidden is None else rows_view(hidden)
    num_tokens = carried_TD.shape[0]
    if capture:
        _capture(hidden_TD, carried_TD, tables, site, late=False)
    if rows_N is None:
        rows_N = tables.slot_T[:num_tokens].nonzero().squeeze(1)
    if rows_N.numel() == 0:
        return
    slot_N = tables.slot_T[rows_N].long()
    count_N = tables.counts_SL[slot_N, site]
    num_entries = int(count_N.max())
    if num_entries == 0:
        return
    if int(count_N.min()) == 0:
        here_N = count_N.nonzero().squeeze(1)
        rows_N, slot_N, count_N = rows_N[here_N], slot_N[here_N], count_N[here_N]
    words_NEW = tables.entries_SLEW[slot_N, site, :num_entries]
    order_E = torch.arange(num_entries, dtype=torch.int32, device=count_N.device)
    share_NE = (covers(words_NEW, tables.pos_T[rows_N]) & (order_E < count_N.unsqueeze(1))).float()
    rows_N, slot_N, words_NEW, share_NE = _used(share_NE, rows_N, slot_N, words_NEW)
    if have_details(words_NEW):
        if not adds_only:
            _measure(hidden_TD, carried_TD, rows_N, words_NEW, share_NE, slot_N, tables)
        share_NE = share_NE * shares_of(words_NEW, tables.pos_T[rows_N], tables.windows_TJ[rows_N], slot_N, tables)
        rows_N, slot_N, words_NEW, share_NE = _used(share_NE, rows_N, slot_N, words_NEW)
    if rows_N.numel() == 0:
        return
    assert not adds_only or tables.probed_TK is None, "an engine that only adds has no probes"
    if adds_only:
        delta_ND = _add(words_NEW, share_NE, tables.bank_RD)
    else:
        x_ND = _stream(hidden_TD, carried_TD, rows_N)
        probes = None
        if tables.probed_TK is not None:
            probes, share_NE = _Probes.take(words_NEW, share_NE, rows_N, tables)
        delta_ND, touched_N = _edit(x_ND, words_NEW, share_NE, tables.bank_RD, tables.keep_norm_S[slot_N], probes)
        if not bool(touched_N.all()):
            chosen_N = touched_N.nonzero().squeeze(1)
            rows_N, delta_ND = rows_N[chosen_N], delta_ND[chosen_N]
    carried_TD[rows_N] = (carried_TD[rows_N].float() + delta_ND).to(carried_TD.dtype)
    if capture:
        _capture(hidden_TD, carried_TD, tables, site, late=True)


def _stream(hidden_TD: torch.Tensor | None, carried_TD: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
    x_ND = carried_TD[rows_N].float()
    return x_ND if hidden_TD is None else hidden_TD[rows_N].float() + x_ND


def _capture(
    hidden_TD: torch.Tensor | None, carried_TD: torch.Tensor, tables: Tables, site: int, *, late: bool
) -> None:
    """Store the requested rows of x in `captured_LCD`.

    late=False, before the edit: all requested rows. late=True, after the edit: again those requested as edited.
    """
    assert tables.capture_T is not None, "these tables have no capture buffers"
    assert tables.captured_LCD is not None
    index_T = tables.capture_T[: carried_TD.shape[0]]
    rows_N = (index_T < 0 if late else index_T).nonzero().squeeze(1)
    if rows_N.numel():
        x_ND = _stream(hidden_TD, carried_TD, rows_N)
        tables.captured_LCD[site, index_T[rows_N].abs().long() - 1] = x_ND.to(tables.captured_LCD.dtype)


def _used(
    share_NE: torch.Tensor, rows_N: torch.Tensor, slot_N: torch.Tensor, words_NEW: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """rows_N, slot_N, words_NEW and share_NE of the rows to which an entry applies."""
    used_N = (share_NE != 0).any(1)
    if bool(used_N.all()):
        return rows_N, slot_N, words_NEW, share_NE
    here_N = used_N.nonzero().squeeze(1)
    return rows_N[here_N], slot_N[here_N], words_NEW[here_N], share_NE[here_N]


def _measure(
    hidden_TD: torch.Tensor | None,
    carried_TD: torch.Tensor,
    rows_N: torch.Tensor,
    words_NEW: torch.Tensor,
    share_NE: torch.Tensor,
    slot_N: torch.Tensor,
    tables: Tables,
) -> None:
    """What entries measure for conditions in x, before it is edited."""
    counts_NE = (share_NE != 0) & (words_NEW[..., tb.START] < 0) & (probe_columns(words_NEW) < 0)
    kind_NE = field(words_NEW[..., tb.WHEN], tb.MEASURE) * counts_NE
    for e in kind_NE.any(0).nonzero().squeeze(1).tolist():
        for kind in (tb.DOT, tb.COSINE):
            here_N = (kind_NE[:, e] == kind).nonzero().squeeze(1)
            if here_N.numel():
                words_NW = words_NEW[here_N, e]
                x_ND = _stream(hidden_TD, carried_TD, rows_N[here_N])
                row_ND = tables.bank_RD[words_NW[:, tb.ROW].long()].float()
                number_N = cosine(x_ND, row_ND) if kind == tb.COSINE else (x_ND * row_ND).sum(1)
                add_measured(number_N, words_NW[:, tb.WHEN], slot_N[here_N], tables)


@dataclass(frozen=True, kw_only=True)
class _Probes:
    """The probes among the entries of the selected rows."""

    words_NEW: torch.Tensor
    column_NE: torch.Tensor
    """int32; -1 = no probe, or one that does not apply to the row."""
    rows_N: torch.Tensor
    tables: Tables

    @classmethod
    def take(
        cls, words_NEW: torch.Tensor, share_NE: torch.Tensor, rows_N: torch.Tensor, tables: Tables
    ) -> tuple[_Probes, torch.Tensor]:
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


def _add(words_NEW: torch.Tensor, share_NE: torch.Tensor, bank_RD: torch.Tensor) -> torch.Tensor:
    """Sum of share * c0 * w over the entries, in order. Returns float32 [N, D]."""
    scale_NE = words_NEW[..., tb.C0].view(torch.float32) * share_NE
    row_NE = words_NEW[..., tb.ROW].long()
    delta_ND = bank_RD[row_NE[:, 0]].float() * scale_NE[:, :1]
    for e in range(1, row_NE.shape[1]):
        delta_ND += bank_RD[row_NE[:, e]].float() * scale_NE[:, e : e + 1]
    return delta_ND


def _edit(
    x_ND: torch.Tensor,
    words_NEW: torch.Tensor,
    share_NE: torch.Tensor,
    bank_RD: torch.Tensor,
    keep_norm_N: torch.Tensor,
    probes: _Probes | None,
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


def add_rms_norm_edit_reference(
    hidden: torch.Tensor,
    residual: torch.Tensor,
    weight_D: torch.Tensor,
    tables: Tables,
    site: int,
    *,
    epsilon: float,
    adds_only: bool,
    capture: bool = False,
    rows_N: torch.Tensor | None = None,
) -> None:
    """Write the normed rows to `hidden` and the edited stream to `residual`, as `add_rms_norm_edit` does."""
    hidden_TD, residual_TD = rows_view(hidden), rows_view(residual)
    x_TD = hidden_TD.float() + residual_TD.float()
    # The float32 sum is edited in one tensor, so it is rounded only once, when it is stored.
    edit_residual_reference(None, x_TD, tables, site, adds_only=adds_only, capture=capture, rows_N=rows_N)
    scale_T1 = 1 / (x_TD.square().sum(1, keepdim=True) / x_TD.shape[1] + epsilon).sqrt()
    residual_TD.copy_(x_TD)
    if capture:
        _capture(None, residual_TD, tables, site, late=True)
    hidden_TD.copy_(x_TD * scale_T1 * weight_D.float())


def route_rows_reference(
    query_start_loc_B1: torch.Tensor,
    idx_mapping_B: torch.Tensor,
    positions_T: torch.Tensor,
    tables: Tables,
    num_tokens: int,
) -> None:
    """Write slot_T and pos_T, as `route_rows` does."""
    num_requests = idx_mapping_B.shape[0]
    tables.slot_T.zero_()
    tables.pos_T.zero_()
    if num_tokens == 0 or num_requests == 0:
        return
    rows_T = torch.arange(num_tokens, dtype=torch.int32, device=query_start_loc_B1.device)
    request_T = torch.searchsorted(query_start_loc_B1[1 : num_requests + 1], rows_T, right=True)
    slot_T = idx_mapping_B[request_T.clamp(max=num_requests - 1)] + 1
    slot_T = torch.where(request_T < num_requests, slot_T, 0).long()
    pos_T = positions_T[:num_tokens].to(torch.int32)
    span_T2 = tables.span_S2[slot_T]
    steered_T = (span_T2[:, 0] <= pos_T) & (pos_T < span_T2[:, 1])
    tables.slot_T[:num_tokens] = torch.where(steered_T, slot_T, 0).to(torch.int32)
    tables.pos_T[:num_tokens] = torch.where(steered_T, pos_T, 0)
