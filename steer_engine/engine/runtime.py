"""The steering state of one engine in one worker: buffers, store, bank, programs, and the routing of each step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from steer_kernels.cpu_plan import StepPlan
from steer_kernels.reference import edit_residual_reference, route_rows_reference
from steer_kernels.tables import Tables
from steer_kernels.trigger_windows import QuietDecoding, advance_triggers_reference

from steer_engine.engine.bank import Bank, Store
from steer_engine.engine.programs import Programs
from steer_engine.engine.site_calls import SiteCalls
from steer_engine.engine.stream import StreamForm
from steer_engine.monitor import Watched, monitor_room
from steer_engine.program import Program
from steer_engine.settings import SteeringConfig
from steer_engine.site import all_points


def allocate_tables(
    config: SteeringConfig,
    *,
    num_sites: int,
    hidden_size: int,
    dtype: torch.dtype,
    device: torch.device | str,
    max_requests: int,
    max_tokens: int,
    num_drafts: int,
    capture_sites: Sequence[int],
    num_points: int | None = None,
) -> Tables:
    """Zeroed device buffers of an engine with `num_sites` armed points. On device "meta" they only count bytes.

    max_tokens: token rows of the largest batch. num_drafts: draft tokens of a request in one step, at most.
    capture_sites: the armed points that can be captured, by their numbers in the tables. num_points: of all stages of a
    pipeline; default: num_sites.
    """
    max_probes, num_probes = config.probe_room(num_points or num_sites)
    num_watched = monitor_room()
    return Tables.allocate(
        num_slots=max_requests + 1,
        num_sites=num_sites,
        num_entries=config.rows + max_probes + num_watched,
        num_rows=config.num_bank_rows(num_sites, max_requests) + num_watched,
        hidden_size=hidden_size,
        max_tokens=max_tokens,
        bank_dtype=dtype,
        device=device,
        num_drafts=num_drafts,
        num_probes=num_probes + num_watched,
        capture_rows=max_tokens if capture_sites else 0,
        capture_sites=capture_sites,
    )


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of device memory per rank."""

    bank: int
    """Rows of the vectors in use."""
    programs: int
    """The programs of running requests."""
    routing: int
    """Which program applies to which token row of a step."""
    probes: int
    """The numbers of probes of a step."""
    capture: int
    """The captured rows of a step."""

    @property
    def total(self) -> int:
        return sum(asdict(self).values())

    @classmethod
    def of(cls, tables: Tables) -> Footprint:
        return cls(
            bank=tables.bank_RD.nbytes,
            programs=sum(
                part.nbytes
                for part in (
                    tables.entries_SLEW,
                    tables.counts_SL,
                    tables.keep_norm_S,
                    tables.span_S2,
                    tables.triggers_SJP,
                    tables.num_triggers_S,
                    tables.history_SHC,
                    tables.measured_SQ,
                    tables.bounds_SQ2,
                )
            ),
            routing=tables.slot_T.nbytes + tables.pos_T.nbytes + tables.windows_TJ.nbytes,
            probes=0 if tables.probed_TK is None else tables.probed_TK.nbytes,
            capture=sum(part.nbytes for part in (tables.capture_T, tables.captured_MCD) if part is not None),
        )


class EngineRuntime:
    """What the op and the runner adapters share. Slots count from 1; slot 0 means "not steered".

    forms: armed block -> how it carries the stream, as the startup probe found. Each is edited at its output, and at
    the sites of `config`. elsewhere: blocks that other stages of a pipeline arm.
    """

    def __init__(
        self,
        *,
        config: SteeringConfig,
        forms: Mapping[int, StreamForm],
        capture_blocks: tuple[int, ...],
        hidden_size: int,
        dtype: torch.dtype,
        device: torch.device,
        max_requests: int,
        max_tokens: int,
        num_drafts: int,
        use_triton: bool,
        elsewhere: tuple[int, ...] = (),
    ) -> None:
        self.config = config
        self.forms = dict(forms)
        self.armed_blocks = tuple(sorted(forms))
        self.points = all_points(self.armed_blocks, config.sites)
        """In the order of the tables (see `site`)."""
        others = all_points(elsewhere, config.sites)
        self.capture_blocks = capture_blocks
        self.capture_points = all_points(capture_blocks, config.sites)
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.use_triton = use_triton
        self.store = Store()
        self.tables = allocate_tables(
            config,
            num_sites=len(self.points),
            hidden_size=hidden_size,
            dtype=dtype,
            device=device,
            max_requests=max_requests,
            max_tokens=max_tokens,
            num_drafts=num_drafts,
            capture_sites=[self.points.index(point) for point in self.capture_points],
            num_points=len(self.points) + len(others),
        )
        self.bank = Bank(self.tables.bank_RD, self.store.row)
        self.programs = Programs(self.tables, self.bank, self.points, others)
        self.requested_blocks = tuple(sorted({*self.armed_blocks, *elsewhere}))
        """The blocks that all workers of the engine arm between them."""
        self.stage_blocks = self.armed_blocks
        """The blocks of this worker's pipeline stage."""
        self.site_modules: dict[str, list[str]] = {}
        """By site besides the blocks' outputs: the names of the modules whose outputs are edited."""
        self.fused_blocks: tuple[int, ...] = ()
        """Blocks that are edited inside the norm that follows them."""
        self.fused_calls = 0
        """Launches of such a norm from Python: every step of an eager engine, and graph captures."""
        self._calls: SiteCalls | None = None
        self._can_capture = bool(capture_blocks)
        self._rows_N: torch.Tensor | None = None
        self._plan: StepPlan | None = None
        self._quiet: QuietDecoding | None = None
        self._capturing = False

    @property
    def device(self) -> torch.device:
        return self.tables.slot_T.device

    @property
    def num_bytes(self) -> int:
        """Device memory of all buffers."""
        return Footprint.of(self.tables).total

    def count_calls(self, calls: SiteCalls) -> None:
        """Count the calls of each site's op until `calls` has seen enough steps; later calls cost nothing more."""
        plain_edit, plain_edit_and_norm = self.edit, self.edit_and_norm

        def edit(hidden: torch.Tensor | None, carried: torch.Tensor, site: int) -> None:
            calls.count(site)
            plain_edit(hidden, carried, site)

        def edit_and_norm(
            hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, site: int, epsilon: float
        ) -> None:
            calls.count(site)
            plain_edit_and_norm(hidden, residual, weight, site, epsilon)

        self._calls = calls
        vars(self).update(edit=edit, edit_and_norm=edit_and_norm)  # hide the methods

    @property
    def counts_calls(self) -> bool:
        """Whether the calls of the sites' ops are still counted."""
        return self._calls is not None

    def end_step(self) -> None:
        """The forward pass of a real step has run.

        Raises:
            UnsupportedEngineError: it is one of the first steps, and a site's op did not run exactly once.
        """
        if self._calls is None:
            return
        self._calls.end_step()
        if self._calls.done:
            self._calls = None
            del vars(self)["edit"], vars(self)["edit_and_norm"]

    def admit(self, slot: int, program: Program, tokens: Sequence[int] = (), measured: Sequence[float] = ()) -> None:
        """See `Programs.admit`."""
        self._quiet = None
        self.programs.admit(slot, program, tokens, measured)

    def watch(self, watched: Watched) -> None:
        """Keep the bank rows of the monitors, whose vectors are in the store, for the life of the engine."""
        self.bank.pin([row for row in watched.rows if row[1] in self.points])

    def measured(self, slots: Sequence[int]) -> torch.Tensor:
        """float64 [slots, Q]: a copy of what has been measured for the conditions of these slots, on the device."""
        index = torch.tensor(slots, dtype=torch.int64, device=self.tables.measured_SQ.device)
        return self.tables.measured_SQ.index_select(0, index)

    def probed(self, rows_N: torch.Tensor, num_columns: int) -> torch.Tensor:
        """float32 [N, columns]: a copy of what the probes measured at these token rows of the step, on the device."""
        assert self.tables.probed_TK is not None
        if not self.programs.probe_slots:  # those of other stages only; the buffer has numbers of an earlier step
            return torch.full((len(rows_N), num_columns), torch.nan, device=rows_N.device)
        return self.tables.probed_TK[:, :num_columns].index_select(0, rows_N)

    def release(self, slot: int) -> None:
        self.programs.release(slot)
        # The slot may get another program; neither could tell.
        self._plan = self._quiet = None

    def route(
        self,
        query_start_loc_B1: torch.Tensor,
        idx_mapping_B: torch.Tensor,
        positions_T: torch.Tensor,
        input_ids_T: torch.Tensor,
        num_tokens: int,
    ) -> None:
        """Write which program applies to each token row of the coming step, on the device.

        query_start_loc_B1: first row of each request. idx_mapping_B: batch position -> slot - 1 (-1 = unsteered).
        input_ids_T: the token of each row. Rows from `num_tokens` on are unsteered.
        """
        if self._calls is not None:
            self._calls.begin_step()
        if not self.programs.steered_slots:
            self._idle()
            return
        if self.programs.probe_slots and self.tables.probed_TK is not None:
            self.tables.probed_TK[:num_tokens].fill_(torch.nan)
        if self.programs.trigger_slots:
            self._advance_triggers(query_start_loc_B1, idx_mapping_B, positions_T, input_ids_T)
        if self.use_triton:
            from steer_kernels.route_rows import route_rows

            route_rows(query_start_loc_B1, idx_mapping_B, positions_T, self.tables, num_tokens)
        elif not self._plan_continues(query_start_loc_B1, idx_mapping_B, positions_T):
            route_rows_reference(query_start_loc_B1, idx_mapping_B, positions_T, self.tables, num_tokens)
            self._make_plan(query_start_loc_B1, idx_mapping_B, positions_T)

    def _advance_triggers(
        self,
        query_start_loc_B1: torch.Tensor,
        idx_mapping_B: torch.Tensor,
        positions_T: torch.Tensor,
        input_ids_T: torch.Tensor,
    ) -> None:
        if self.use_triton:
            from steer_kernels.advance_triggers import advance_triggers

            advance_triggers(query_start_loc_B1, idx_mapping_B, positions_T, input_ids_T, self.tables)
            return
        step = (query_start_loc_B1, idx_mapping_B, positions_T)
        if self._quiet is not None and self._quiet.advance(*step, input_ids_T, self.tables):
            return
        advance_triggers_reference(*step, input_ids_T, self.tables)
        decodes = len(positions_T) == len(idx_mapping_B) and bool((query_start_loc_B1.diff() == 1).all())
        self._quiet = QuietDecoding(*step, self.tables) if decodes else None

    def idle(self) -> None:
        """The coming forward pass is a dummy: it steers and captures nothing."""
        self.end_step()
        self._idle()

    def _idle(self) -> None:
        """No row of the coming forward pass is steered or captured."""
        self.tables.slot_T.zero_()
        self._rows_N = self._plan = None
        self._stop_capturing()

    def capture(self, rows: list[int], after: Sequence[bool]) -> None:
        """Capture these token rows of the coming step at every capture point, each before or `after` the edit."""
        assert self.tables.capture_T is not None
        self._stop_capturing()
        if rows:
            index_C = torch.tensor(rows, dtype=torch.int64, device=self.tables.capture_T.device)
            places = [-place if late else place for place, late in enumerate(after, start=1)]
            self.tables.capture_T[index_C] = torch.tensor(places, dtype=torch.int32, device=index_C.device)
            self._capturing = True
            if self._rows_N is None and not self.use_triton:
                self._rows_N = index_C[:0]

    def captured(self, num_rows: int, points: Sequence[int] | None = None) -> torch.Tensor:
        """float32 [points, num_rows, D] on the host: the rows of the last step, in the order of `capture`.

        points: some of the capture points; default: all.
        """
        assert self.tables.captured_MCD is not None
        rows_MCD = self.tables.captured_MCD[:, :num_rows]
        if points is not None and tuple(points) != self.capture_points:
            rows_MCD = rows_MCD[[self.capture_points.index(point) for point in points]]
        return rows_MCD.cpu()

    def edit(self, hidden: torch.Tensor | None, carried: torch.Tensor, site: int) -> None:
        """The op's body (see `op.edit_residual`)."""
        if self.use_triton:
            from steer_kernels.edit_residual import edit_residual

            edit_residual(
                hidden, carried, self.tables, site, adds_only=self.config.adds_only, capture=self._can_capture
            )
        elif self._plan is not None and not self._capturing:
            self._plan.apply(hidden, carried, self.tables.bank_RD, site)
        elif self._rows_N is not None:
            edit_residual_reference(
                hidden,
                carried,
                self.tables,
                site,
                adds_only=self.config.adds_only,
                capture=self._capturing,
                rows_N=self._rows_N,
            )

    def edit_and_norm(
        self, hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, site: int, epsilon: float
    ) -> None:
        from steer_kernels.add_rms_norm_edit import add_rms_norm_edit

        self.fused_calls += 1
        add_rms_norm_edit(
            hidden,
            residual,
            weight,
            self.tables,
            site,
            epsilon=epsilon,
            adds_only=self.config.adds_only,
            capture=self._can_capture,
        )

    def _plan_continues(
        self, query_start_loc_B1: torch.Tensor, idx_mapping_B: torch.Tensor, positions_T: torch.Tensor
    ) -> bool:
        """Whether the last step's plan fits the coming step: the same rows, with only positions advanced."""
        # A capture goes through the reference, which needs positions.
        return (
            self._plan is not None
            and not self._can_capture
            and self._plan.continues(query_start_loc_B1, idx_mapping_B, positions_T, self.tables.windows_TJ)
        )

    def _make_plan(
        self, query_start_loc_B1: torch.Tensor, idx_mapping_B: torch.Tensor, positions_T: torch.Tensor
    ) -> None:
        """On a CPU the host may read the tables: the step is planned once, not once per site."""
        slot_T = self.tables.slot_T[: positions_T.shape[0]]
        rows_N = slot_T.nonzero().squeeze(1)
        self._rows_N = rows_N if rows_N.numel() else None
        self._plan = None
        pos_T = self.tables.pos_T[: positions_T.shape[0]]
        if self._rows_N is not None and not self.programs.are_measured(slot_T, pos_T):
            self._plan = StepPlan.of_step(self.tables, rows_N, query_start_loc_B1, idx_mapping_B, positions_T)

    def _stop_capturing(self) -> None:
        if self._capturing and self.tables.capture_T is not None:
            self.tables.capture_T.zero_()
        self._capturing = False
