"""Plain-torch versions of the kernels. Tests compare the kernels with them, and a CPU engine runs them.

Legend: see `tables`. N = rows selected from the T rows of the batch.
"""

from __future__ import annotations

import torch

from steer_kernels import tables as tb
from steer_kernels.algebra import Probes, change_of
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
        x_ND = stream_rows(hidden_TD, carried_TD, rows_N)
        probes = None
        if tables.probed_TK is not None:
            probes, share_NE = Probes.take(words_NEW, share_NE, rows_N, tables)
        delta_ND, touched_N = change_of(x_ND, words_NEW, share_NE, tables.bank_RD, tables.keep_norm_S[slot_N], probes)
        if not bool(touched_N.all()):
            chosen_N = touched_N.nonzero().squeeze(1)
            rows_N, delta_ND = rows_N[chosen_N], delta_ND[chosen_N]
    carried_TD[rows_N] = (carried_TD[rows_N].float() + delta_ND).to(carried_TD.dtype)
    if capture:
        _capture(hidden_TD, carried_TD, tables, site, late=True)


def stream_rows(hidden_TD: torch.Tensor | None, carried_TD: torch.Tensor, rows_N: torch.Tensor) -> torch.Tensor:
    """float32 [N, D]: x of these rows."""
    x_ND = carried_TD[rows_N].float()
    return x_ND if hidden_TD is None else hidden_TD[rows_N].float() + x_ND


def _capture(
    hidden_TD: torch.Tensor | None, carried_TD: torch.Tensor, tables: Tables, site: int, *, late: bool
) -> None:
    """Store the requested rows of x, at a site that has capture rows.

    late=False, before the edit: all requested rows. late=True, after the edit: again those requested as edited.
    """
    captured_CD = tables.captured_at(site)
    if captured_CD is None:
        return
    assert tables.capture_T is not None
    index_T = tables.capture_T[: carried_TD.shape[0]]
    rows_N = (index_T < 0 if late else index_T).nonzero().squeeze(1)
    if rows_N.numel():
        x_ND = stream_rows(hidden_TD, carried_TD, rows_N)
        captured_CD[index_T[rows_N].abs().long() - 1] = x_ND.to(captured_CD.dtype)


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
                x_ND = stream_rows(hidden_TD, carried_TD, rows_N[here_N])
                row_ND = tables.bank_RD[words_NW[:, tb.ROW].long()].float()
                number_N = cosine(x_ND, row_ND) if kind == tb.COSINE else (x_ND * row_ND).sum(1)
                add_measured(number_N, words_NW[:, tb.WHEN], slot_N[here_N], tables)


def _add(words_NEW: torch.Tensor, share_NE: torch.Tensor, bank_RD: torch.Tensor) -> torch.Tensor:
    """Sum of share * c0 * w over the entries, in order. Returns float32 [N, D]."""
    scale_NE = words_NEW[..., tb.C0].view(torch.float32) * share_NE
    row_NE = words_NEW[..., tb.ROW].long()
    delta_ND = bank_RD[row_NE[:, 0]].float() * scale_NE[:, :1]
    for e in range(1, row_NE.shape[1]):
        delta_ND += bank_RD[row_NE[:, e]].float() * scale_NE[:, e : e + 1]
    return delta_ND


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
