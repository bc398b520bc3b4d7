"""The edit plan of a CPU engine: the edits of one step at all sites, computed once and reused until the batch changes.

On a CPU the host can read the routing buffers without a device sync. With a plan, a site needs a few torch calls on
the steered rows; the reference needs about forty. Steps with captures or rows that are measured use the reference.
Plan and reference round identically, bit for bit, so a row never depends on what other requests in the batch use.

Legend: N steered rows (or 1, for values that all of them share), L sites at which a request of the batch has entries,
E entries per site, T rows of the batch, B requests of the batch, D hidden size, W words per entry, X span bounds of all
entries of a program, C coefficients.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from steer_kernels import tables as tb
from steer_kernels.cpu_batch import Decoding, Used
from steer_kernels.cpu_full_edits import FullEdits, take_full
from steer_kernels.cpu_probes import SiteProbes, take_probes
from steer_kernels.fading import Fading, Schedules, add_up
from steer_kernels.reference import rows_view
from steer_kernels.shares import covers, have_details, shares_of
from steer_kernels.tables import Tables

MAX_GATHERED_NUMBERS = 2**18
"""Most float32 numbers of bank rows that a plan gathers for all sites at once (1 MiB). Below it, the cost of the calls
dominates; above it, each plan would need a new large allocation."""


@dataclass(frozen=True, kw_only=True)
class Step:
    """One entry at one site, for all steered rows. Coefficients are float32 [N, 1], 0 where the entry does not apply.

    c1, c2 and c3 are None if they are 0 in every row.
    """

    row_N: torch.Tensor
    gathered_ND: torch.Tensor | None
    """The bank rows as float32 [N, D]; None = not gathered, look them up at each site."""
    c0: torch.Tensor
    c1: torch.Tensor | None
    c2: torch.Tensor | None
    c3: torch.Tensor | None
    lo: torch.Tensor
    hi: torch.Tensor
    applies: torch.Tensor | None
    """bool [N, 1]; None = in all rows."""

    @property
    def only_adds(self) -> bool:
        return self.c1 is None and self.c2 is None and self.c3 is None

    def delta(self, x_ND: torch.Tensor | None, bank_RD: torch.Tensor) -> torch.Tensor:
        """g(x) * w as float32 [N, D]. x may be None if the step only adds."""
        w_ND = bank_RD.index_select(0, self.row_N).float() if self.gathered_ND is None else self.gathered_ND
        g_N1 = self.c0
        if not self.only_adds:
            assert x_ND is not None
            if self.c1 is not None:
                g_N1 = g_N1 + self.c1 * x_ND.norm(dim=1, keepdim=True)
            if self.c2 is not None or self.c3 is not None:
                dot_N1 = (x_ND * w_ND).sum(1, keepdim=True)
                if self.c2 is not None:
                    g_N1 = g_N1 + self.c2 * dot_N1
                if self.c3 is not None:
                    g_N1 = g_N1 + self.c3 * (torch.minimum(torch.maximum(dot_N1, self.lo), self.hi) - dot_N1)
            if self.applies is not None:
                g_N1 = torch.where(self.applies, g_N1, 0.0)
        if self.gathered_ND is None and w_ND.shape[0] == g_N1.shape[0]:
            return w_ND.mul_(g_N1)  # in place: no allocation of [N, D] at every site
        return w_ND * g_N1


@dataclass(frozen=True, kw_only=True)
class StepPlan:
    """The edits at all sites for the steered rows of one engine step."""

    decoding: Decoding | None
    """None = not every request has exactly one row (prefill): the plan cannot be reused."""
    fading: Fading | None
    """What to write again in every step while a schedule runs; None = nothing."""
    rows_N: torch.Tensor
    """int64: indices of the steered rows in the batch."""
    all_rows: bool
    """True if rows_N is every row of the batch, in order."""
    place_of: dict[int, int]
    """Site -> its place in L, if an entry of its steps may apply to a row."""
    delta_LND: torch.Tensor | None
    """The sum to add at each site. None if an entry needs x or the bank rows are not gathered; then see steps_at_L."""
    steps_at_L: list[list[Step]]
    """By site, the entries in order; empty if delta_LND is set."""
    full: dict[int, FullEdits]
    """The other edits by site: all edits of sites at which one has a gate, a mode or a kept norm."""
    probes: dict[int, SiteProbes]
    """The probes of the sites that have any."""

    @classmethod
    def of_step(
        cls,
        tables: Tables,
        rows_N: torch.Tensor,
        query_start_loc_B1: torch.Tensor,
        idx_mapping_B: torch.Tensor,
        positions_T: torch.Tensor,
    ) -> StepPlan:
        """The plan of a step. `route_rows` has already written the tables from the same arguments.

        rows_N: the steered rows, at least one.
        """
        slot_N = tables.slot_T[rows_N].long()
        used = Used.of_batch(tables, idx_mapping_B)
        decoding = Decoding.of_step(tables, used, query_start_loc_B1, idx_mapping_B, positions_T)
        if decoding is None and bool((slot_N == slot_N[0]).all()):
            slot_N = slot_N[:1]  # the rows of one request share its entries
        words_NLEW, pos_N = used.words(tables, slot_N), tables.pos_T[rows_N]
        share_NLE, schedules = covers(words_NLEW, pos_N).float(), None
        probes: dict[int, SiteProbes] = {}
        details = have_details(words_NLEW)
        windows_NJ = tables.windows_TJ[rows_N]
        if details:
            share_NLE *= shares_of(words_NLEW, pos_N, windows_NJ, slot_N, tables)
            probes, words_NLEW, share_NLE = take_probes(tables, words_NLEW, share_NLE, rows_N)
        full, share_NLE = take_full(words_NLEW, share_NLE, rows_N, tables.keep_norm_S[slot_N])
        if details and decoding is not None:
            step = (words_NLEW, covers(words_NLEW, pos_N), rows_N, pos_N, windows_NJ, slot_N, tables)
            schedules, ended_N = Schedules.of_step(*step)
            decoding.not_before(rows_N, ended_N)
            if schedules is not None and full is not None:
                decoding = schedules = None  # shares of full edits do not follow schedules
        entries = _Entries.of(words_NLEW, share_NLE, None if schedules is None else schedules.running_LEN1)
        gathered_LEND = entries.bank_rows(tables.bank_RD)
        delta_LND = None if gathered_LEND is None or not entries.only_add else entries.added(gathered_LEND)
        edits_L = entries.may_apply_LEN1.flatten(1).any(1).tolist()
        sites_L = used.sites_L.tolist()
        return cls(
            decoding=decoding,
            fading=None if schedules is None else entries.fading(schedules, gathered_LEND, delta_LND),
            rows_N=rows_N,
            all_rows=rows_N.shape[0] == positions_T.shape[0],
            place_of={site: place for place, site in enumerate(sites_L) if edits_L[place]},
            delta_LND=delta_LND,
            steps_at_L=entries.steps(gathered_LEND) if delta_LND is None else [],
            full={sites_L[place]: edits for place, edits in (full or {}).items()},
            probes={sites_L[place]: numbers for place, numbers in probes.items()},
        )

    def continues(
        self,
        query_start_loc_B1: torch.Tensor,
        idx_mapping_B: torch.Tensor,
        positions_B: torch.Tensor,
        windows_TJ: torch.Tensor,
    ) -> bool:
        """Whether this plan is valid for the given step too. If schedules run, it has been advanced to the step."""
        step = (query_start_loc_B1, idx_mapping_B, positions_B, windows_TJ)
        if self.decoding is None or not self.decoding.continues(*step):
            return False
        return self.fading is None or self.fading.advance(positions_B)

    def apply(self, hidden: torch.Tensor | None, carried: torch.Tensor, bank_RD: torch.Tensor, site: int) -> None:
        """Edit `carried` [..., T, D] in place at `site`. x = hidden + carried, or carried alone."""
        place, probes = self.place_of.get(site), self.probes.get(site)
        if site in self.full:
            self.full[site].apply(hidden, rows_view(carried), bank_RD, probes, len(self.rows_N))
            return
        if place is None:
            if probes is not None:
                probes.write(hidden, rows_view(carried), None, bank_RD)
            return
        carried_TD = rows_view(carried)
        every = self.all_rows and carried_TD.shape[0] == self.rows_N.shape[0]
        delta_ND = self._delta(hidden, carried_TD, bank_RD, place, every=every)
        if probes is not None:
            probes.write(hidden, carried_TD, delta_ND, bank_RD)
        if carried_TD.dtype != torch.float32:
            carried_TD[self.rows_N] = (carried_TD[self.rows_N].float() + delta_ND).to(carried_TD.dtype)
        elif every:
            carried_TD += delta_ND
        else:
            carried_TD.index_add_(0, self.rows_N, delta_ND.expand(self.rows_N.shape[0], -1))

    def _delta(
        self, hidden: torch.Tensor | None, carried_TD: torch.Tensor, bank_RD: torch.Tensor, place: int, *, every: bool
    ) -> torch.Tensor:
        """float32 [N or 1, D]."""
        if self.delta_LND is not None:
            return self.delta_LND[place]
        steps = self.steps_at_L[place]
        x_ND = None
        if not all(step.only_adds for step in steps):
            x_ND = self._rows(carried_TD, every)
            if hidden is not None:
                x_ND = self._rows(rows_view(hidden), every) + x_ND
        delta_ND = steps[0].delta(x_ND, bank_RD)
        for step in steps[1:]:
            delta_ND = delta_ND + step.delta(None if x_ND is None else x_ND + delta_ND, bank_RD)
        return delta_ND

    def _rows(self, stream_TD: torch.Tensor, every: bool) -> torch.Tensor:
        return (stream_TD if every else stream_TD.index_select(0, self.rows_N)).float()


@dataclass(frozen=True, kw_only=True)
class _Entries:
    """All entries of the steered rows, contiguous entry by entry."""

    row_LEN: torch.Tensor
    floats_LECN1: torch.Tensor
    """C0, C1, C2, C3, LO, HI; the first four are multiplied by the share."""
    plain_LECN1: torch.Tensor
    """C0, C1, C2, C3 before that."""
    share_LEN1: torch.Tensor
    applies_LEN1: torch.Tensor
    running_LEN1: torch.Tensor | None
    """bool: a schedule runs, so the share changes while the plan is used; None = nowhere."""

    @classmethod
    def of(cls, words_NLEW: torch.Tensor, share_NLE: torch.Tensor, running_LEN1: torch.Tensor | None) -> _Entries:
        """words_NLEW: one per row, or a single one for all rows. In the second case the result has one row too,
        unless an entry applies only to some of the rows.

        share_NLE: by how much each entry applies, in every row.
        """
        if words_NLEW.shape[0] == 1 and bool((share_NLE == share_NLE[0]).all()):
            share_NLE = share_NLE[:1]
        share_LEN1 = share_NLE.permute(1, 2, 0).contiguous().unsqueeze(-1)
        floats_NLEC = words_NLEW[..., tb.C0 : tb.HI + 1]
        floats_LECN1 = floats_NLEC.permute(1, 2, 3, 0).contiguous().view(torch.float32).unsqueeze(-1)
        coefficients_LECN1 = floats_LECN1[:, :, :4] * share_LEN1.unsqueeze(2)
        bounds_LECN1 = floats_LECN1[:, :, 4:].expand(*coefficients_LECN1.shape[:2], 2, *coefficients_LECN1.shape[3:])
        return cls(
            row_LEN=words_NLEW[..., tb.ROW].permute(1, 2, 0).contiguous().long(),
            floats_LECN1=torch.cat([coefficients_LECN1, bounds_LECN1], dim=2),
            plain_LECN1=floats_LECN1[:, :, :4],
            share_LEN1=share_LEN1,
            applies_LEN1=share_LEN1 != 0,
            running_LEN1=running_LEN1,
        )

    @property
    def may_apply_LEN1(self) -> torch.Tensor:
        """bool: the entry applies at some position for which the plan is used."""
        return self.applies_LEN1 if self.running_LEN1 is None else self.applies_LEN1 | self.running_LEN1

    @property
    def _needs_x_LEC(self) -> torch.Tensor:
        """bool [L, E, 3]: C1, C2, C3 is used in a row."""
        return ((self.plain_LECN1[:, :, 1:] != 0) & self.may_apply_LEN1.unsqueeze(2)).flatten(3).any(3)

    @property
    def only_add(self) -> bool:
        return not bool(self._needs_x_LEC.any())

    def bank_rows(self, bank_RD: torch.Tensor) -> torch.Tensor | None:
        """float32 [L, E, N, D], or None if there are more than MAX_GATHERED_NUMBERS numbers."""
        if self.row_LEN.numel() * bank_RD.shape[1] > MAX_GATHERED_NUMBERS:
            return None
        return bank_RD.index_select(0, self.row_LEN.flatten()).view(*self.row_LEN.shape, -1).float()

    def added(self, gathered_LEND: torch.Tensor) -> torch.Tensor:
        """float32 [L, N, D]: the sum over the entries in order. All entries must only add."""
        c0_LEN1 = self.floats_LECN1[:, :, 0]
        shape = (c0_LEN1.shape[0], c0_LEN1.shape[2], gathered_LEND.shape[-1])
        return add_up(gathered_LEND, c0_LEN1, torch.empty(shape))

    def fading(
        self, schedules: Schedules, gathered_LEND: torch.Tensor | None, delta_LND: torch.Tensor | None
    ) -> Fading:
        """What to write again for other positions. Each row has its own entries."""
        used = 1 if self.only_add else 4
        return Fading(
            schedules=schedules,
            plain_LECN1=self.plain_LECN1[:, :, :used],
            share_LEN1=self.share_LEN1,
            coefficients_LECN1=self.floats_LECN1[:, :, :used],
            applies_LEN1=None if self.only_add else self.applies_LEN1,
            gathered_LEND=gathered_LEND,
            delta_LND=delta_LND,
        )

    def steps(self, gathered_LEND: torch.Tensor | None) -> list[list[Step]]:
        """By site, the entries that apply to at least one row."""
        has_LEC = self._needs_x_LEC.tolist()
        any_LE = self.may_apply_LEN1.flatten(2).any(2).tolist()
        # Where a schedule runs, the share may become 0.
        always_LEN1 = self.applies_LEN1 if self.running_LEN1 is None else self.applies_LEN1 & ~self.running_LEN1
        all_LE = always_LEN1.flatten(2).all(2).tolist()

        def steps_of(site: int) -> Iterator[Step]:
            for e, used in enumerate(any_LE[site]):
                if used:
                    c0, c1, c2, c3, lo, hi = self.floats_LECN1[site, e].unbind()
                    has_c1, has_c2, has_c3 = has_LEC[site][e]
                    yield Step(
                        row_N=self.row_LEN[site, e],
                        gathered_ND=None if gathered_LEND is None else gathered_LEND[site, e],
                        c0=c0,
                        c1=c1 if has_c1 else None,
                        c2=c2 if has_c2 else None,
                        c3=c3 if has_c3 else None,
                        lo=lo,
                        hi=hi,
                        applies=None if all_LE[site][e] else self.applies_LEN1[site, e],
                    )

        return [list(steps_of(site)) for site in range(len(any_LE))]
