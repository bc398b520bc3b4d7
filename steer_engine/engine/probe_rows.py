"""Which token rows of a step carry numbers of probes, and their way from the device to the engine core.

In a pipeline, each stage passes on what it and the stages before it have measured; the last one reports it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from steer_engine.engine.runtime import EngineRuntime
from steer_engine.engine.step_report import ProbedRows, to_host
from steer_engine.probe import ProbePlan
from steer_engine.program import Program

PASSED_ON = "steer_probed"
"""Key of the numbers among the tensors that a stage of a pipeline sends to the next one."""


class ProbeRows:
    """The requests with probes on this worker, by id. N rows of a step, T all of its rows, K columns of numbers."""

    def __init__(self, runtime: EngineRuntime) -> None:
        self._runtime = runtime
        self._plans: dict[str, ProbePlan] = {}
        self._request_ids: list[str] = []
        self._counts: list[int] = []
        self._rows: list[range] = []
        self._earlier_NK: torch.Tensor | None = None

    def start(self, request_id: str, program: Program) -> None:
        """A request gets a slot."""
        if program.probes is not None:
            self._plans[request_id] = program.probes

    def stop(self, request_id: str) -> None:
        """A request gives up its slot."""
        self._plans.pop(request_id, None)

    def plan(self, request_ids: Sequence[str], first_positions_B: np.ndarray, counts_B: np.ndarray) -> None:
        """Before a step: note which rows to copy after it.

        request_ids: the batch in row order. first_positions_B: first computed position of each request; with drafts it
        may be too large for one whose prompt is complete. counts_B: token rows of each request.
        """
        self._request_ids, self._counts, self._rows = [], [], []
        if not self._plans:
            return
        start_row = 0
        for request_id, first, count in zip(request_ids, first_positions_B.tolist(), counts_B.tolist(), strict=True):
            plan = self._plans.get(request_id)
            # Rows before the first measured position would only carry empty numbers.
            skipped = 0 if plan is None else min(count, max(0, plan.start - first))
            if plan is not None and skipped < count:
                self._request_ids.append(request_id)
                self._counts.append(count - skipped)
                self._rows.append(range(start_row + skipped, start_row + count))
            start_row += count

    @property
    def planned(self) -> bool:
        """Whether there are rows to copy after the step."""
        return bool(self._rows)

    def receive(self, numbers_NK: torch.Tensor | None) -> None:
        """Before a step: what earlier stages measured in it, NaN at blocks that they do not have; None = nothing."""
        self._earlier_NK = numbers_NK

    def pass_on(self) -> torch.Tensor | None:
        """After the forward pass of a stage that is not the last one: float32 [N, K], for `receive`."""
        if not self._rows:
            return None
        numbers_NK = self._numbers(self._device_rows())
        self._request_ids, self._counts, self._rows = [], [], []
        return numbers_NK

    def collect(self, positions_T: torch.Tensor) -> ProbedRows | None:
        """After the forward pass: copy the rows that were planned, without waiting for the device."""
        if not self._rows:
            return None
        rows_N = self._device_rows()
        probed = ProbedRows(
            request_ids=self._request_ids,
            counts=self._counts,
            positions_N=to_host(positions_T.index_select(0, rows_N)),
            numbers_NK=to_host(self._numbers(rows_N)),
        )
        self._request_ids, self._counts, self._rows = [], [], []
        return probed

    def _device_rows(self) -> torch.Tensor:
        rows_N = torch.tensor([row for rows in self._rows for row in rows], dtype=torch.int64)
        return rows_N.to(self._runtime.device, non_blocking=True)

    def _numbers(self, rows_N: torch.Tensor) -> torch.Tensor:
        num_columns = max(self._plans[request_id].num_columns for request_id in self._request_ids)
        numbers_NK = self._runtime.probed(rows_N, num_columns)
        earlier_NK, self._earlier_NK = self._earlier_NK, None
        return numbers_NK if earlier_NK is None else torch.where(numbers_NK.isnan(), earlier_NK, numbers_NK)
