"""One engine's steering state in one worker: buffers, store, bank, programs and the routing of each step."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from steer_kernels.reference import edit_residual_reference, route_rows_reference
from steer_kernels.tables import Tables

from steer_engine.config import SteeringConfig
from steer_engine.program import Program
from steer_engine.runtime.add_plan import AddPlan
from steer_engine.runtime.bank import Bank
from steer_engine.runtime.programs import Programs
from steer_engine.runtime.store import Store
from steer_engine.runtime.stream import StreamForm


class EngineRuntime:
    """Everything that the op and the runner adapters share. Slots count from 1; slot 0 is "not steered".

    forms: armed block -> how it carries the stream, as the start-up probe found.
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
        use_triton: bool,
    ) -> None:
        self.config = config
        self.forms = dict(forms)
        self.armed_blocks = tuple(sorted(forms))
        self.capture_blocks = capture_blocks
        self.hidden_size = hidden_size
        self.dtype = dtype
        self.max_requests = max_requests
        self.max_tokens = max_tokens
        self.use_triton = use_triton
        self.store = Store()
        num_sites = len(self.armed_blocks)
        self.tables = Tables.allocate(
            num_slots=max_requests + 1,
            num_sites=num_sites,
            num_entries=config.rows,
            num_rows=config.num_bank_rows(num_sites, max_requests),
            hidden_size=hidden_size,
            max_tokens=max_tokens,
            bank_dtype=dtype,
            device=device,
            capture_rows=max_tokens if capture_blocks else 0,
        )
        self.bank = Bank(self.tables.bank_RD, self.store.row)
        self.programs = Programs(self.tables, self.bank, self.armed_blocks)
        self.fused_blocks: tuple[int, ...] = ()
        """Blocks whose edit happens inside the norm that follows them."""
        self.fused_calls = 0
        """How often such a norm was launched from Python: each step of an eager engine, and graph captures."""
        self._reads = bool(capture_blocks)
        self._rows_N: torch.Tensor | None = None
        self._adds: AddPlan | None = None
        self._reading = False

    @property
    def num_bytes(self) -> int:
        """Device memory of all buffers."""
        tensors = (getattr(self.tables, name) for name in type(self.tables).__slots__)
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    def admit(self, slot: int, program: Program) -> None:
        self.programs.admit(slot, program)

    def release(self, slot: int) -> None:
        self.programs.release(slot)

    def route(
        self, query_start_loc_B1: torch.Tensor, idx_mapping_B: torch.Tensor, positions_T: torch.Tensor, num_tokens: int
    ) -> None:
        """Say which row of the coming step belongs to whose program, on the device.

        idx_mapping_B: batch position -> slot - 1 (-1 = unsteered). Rows from `num_tokens` on are unsteered.
        """
        if self.use_triton:
            from steer_kernels.route_rows import route_rows

            route_rows(query_start_loc_B1, idx_mapping_B, positions_T, self.tables, num_tokens)
        else:
            route_rows_reference(query_start_loc_B1, idx_mapping_B, positions_T, self.tables, num_tokens)
            self._plan(num_tokens)

    def idle(self) -> None:
        """The coming forward pass is a dummy: nothing is steered or read in it."""
        self.tables.slot_T.zero_()
        self._rows_N = self._adds = None
        self._stop_reading()

    def read(self, rows: list[int]) -> None:
        """Read these token rows of the coming step at every capture block (see `captured`)."""
        assert self.tables.capture_T is not None
        self._stop_reading()
        if rows:
            index_C = torch.tensor(rows, dtype=torch.int64, device=self.tables.capture_T.device)
            places_C = torch.arange(1, len(rows) + 1, dtype=torch.int32, device=index_C.device)
            self.tables.capture_T[index_C] = places_C
            self._reading = True
            if self._rows_N is None and not self.use_triton:
                self._rows_N = index_C[:0]

    def captured(self, num_rows: int) -> torch.Tensor:
        """float32 [capture blocks, num_rows, D] on the host: what the last step read, in the order asked."""
        assert self.tables.captured_LCD is not None
        sites = [self.armed_blocks.index(block) for block in self.capture_blocks]
        return self.tables.captured_LCD[sites, :num_rows].cpu()

    def edit(self, hidden: torch.Tensor | None, carried: torch.Tensor, site: int) -> None:
        """The op's body (see `op.edit_residual`)."""
        if self.use_triton:
            from steer_kernels.edit_residual import edit_residual

            edit_residual(hidden, carried, self.tables, site, adds_only=self.config.adds_only, capture=self._reads)
        elif self._adds is not None and not self._reading:
            self._adds.apply(carried, self.tables.bank_RD, site)
        elif self._rows_N is not None:
            edit_residual_reference(
                hidden,
                carried,
                self.tables,
                site,
                adds_only=self.config.adds_only,
                capture=self._reading,
                rows_N=self._rows_N,
            )

    def edit_and_norm(
        self, hidden: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, site: int, epsilon: float
    ) -> None:
        """The body of `op.add_rms_norm_edit`; only where the kernels are Triton's."""
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
            capture=self._reads,
        )

    def _plan(self, num_tokens: int) -> None:
        """Without a device queue the host may look: what a step does is worked out once, not per site."""
        slot_T = self.tables.slot_T[:num_tokens]
        rows_N = slot_T.nonzero().squeeze(1)
        self._rows_N = rows_N
        self._adds = None
        if rows_N.numel() == 0:
            self._rows_N = None
        elif not self.programs.beyond_adds(slot_T):
            self._adds = AddPlan.of_step(self.tables, rows_N, num_tokens)

    def _stop_reading(self) -> None:
        if self._reading and self.tables.capture_T is not None:
            self.tables.capture_T.zero_()
        self._reading = False
