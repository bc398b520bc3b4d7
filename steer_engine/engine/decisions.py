"""What was measured for the conditions of requests.

The device decides: an entry compares its slot's numbers with their bounds. The numbers are complete when the last
prompt token has been computed. They are copied then, without waiting for the device, and kept until the request is
gone: the answer reports them, and a request that was preempted gets them back, so that it is never decided twice.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from steer_engine.engine.runtime import EngineRuntime
from steer_engine.program import Program


@dataclass(frozen=True, kw_only=True)
class _Pending:
    slot: int
    prompt_len: int
    count: int
    """Of the conditions."""


class Decisions:
    """The numbers of conditions by request id."""

    def __init__(self, runtime: EngineRuntime) -> None:
        self._runtime = runtime
        self._pending: dict[str, _Pending] = {}
        self._complete: list[str] = []
        """Requests whose prompt ends in the coming step."""
        self._measured: dict[str, tuple[torch.Tensor, int, int]] = {}
        """A copy of several requests' numbers, the request's row in it, and its number of conditions."""

    def start(self, request_id: str, slot: int, program: Program) -> None:
        """A request gets a slot."""
        if program.conditions and request_id not in self._measured:
            count = len(program.conditions)
            self._pending[request_id] = _Pending(slot=slot, prompt_len=program.prompt_len, count=count)

    def stop(self, request_id: str) -> None:
        """A request gives up its slot, and may come back."""
        self._pending.pop(request_id, None)

    def forget(self, request_ids: Iterable[str]) -> None:
        """Requests have ended."""
        if self._measured or self._pending:
            for request_id in request_ids:
                self._pending.pop(request_id, None)
                self._measured.pop(request_id, None)

    def plan(self, request_ids: Sequence[str], first_positions_B: np.ndarray, counts_B: np.ndarray) -> None:
        """Before a step: note which prompts end in it. The arguments are those of the batch, in row order."""
        if not self._pending:
            return
        ends_B = first_positions_B + counts_B
        self._complete = [
            request_id
            for place, request_id in enumerate(request_ids)
            if request_id in self._pending and ends_B[place] >= self._pending[request_id].prompt_len
        ]

    def copy(self) -> None:
        """After a step: copy the numbers of the prompts that ended in it, on the device."""
        if not self._complete:
            return
        # A request may have left since the step was planned.
        ended = [
            (request_id, pending)
            for request_id in self._complete
            if (pending := self._pending.pop(request_id, None)) is not None
        ]
        self._complete = []
        numbers_NQ = self._runtime.measured([pending.slot for _, pending in ended])
        for row, (request_id, pending) in enumerate(ended):
            self._measured[request_id] = (numbers_NQ, row, pending.count)

    def measured(self, request_id: str) -> list[float]:
        """The numbers of a request's conditions, in order; empty before its prompt is complete.

        Waits for the device.
        """
        found = self._measured.get(request_id)
        if found is None:
            return []
        numbers_NQ, row, count = found
        numbers: list[float] = numbers_NQ[row, :count].tolist()
        return numbers
