"""What the workers have read for requests that asked for it, until somebody takes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steer_engine.program import Capture
from steer_engine.runtime.engine_runtime import EngineRuntime


@dataclass(frozen=True)
class _Planned:
    key: str
    position: int


class Reader:
    """Plans which token rows of a step are read, and keeps what was read by the request's capture key.

    L capture blocks, P positions, D hidden size.
    """

    def __init__(self, runtime: EngineRuntime) -> None:
        self._runtime = runtime
        self._planned: list[_Planned] = []
        self._read: dict[str, dict[int, np.ndarray]] = {}

    def plan(self, captures: Sequence[Capture | None], first_positions: Sequence[int], counts: Sequence[int]) -> None:
        """Before a step. Per request of the batch, in row order: what it reads, its first position, its rows."""
        rows: list[int] = []
        self._planned = []
        start_row = 0
        for capture, first, count in zip(captures, first_positions, counts, strict=True):
            if capture is not None:
                for position in range(max(first, capture.start), min(first + count, capture.end)):
                    rows.append(start_row + position - first)
                    self._planned.append(_Planned(capture.key, position))
            start_row += count
        self._runtime.read(rows)

    def collect(self) -> None:
        """After a step: fetch what it read. A position that is computed again (preemption) is overwritten."""
        if not self._planned:
            return
        rows_LCD = self._runtime.captured(len(self._planned)).numpy()
        for c, planned in enumerate(self._planned):
            self._read.setdefault(planned.key, {})[planned.position] = rows_LCD[:, c].copy()
        self._planned = []

    def take(self, key: str) -> tuple[list[int], np.ndarray]:
        """Positions in order, and float32 [L, P, D]; gone from here afterwards."""
        rows = self._read.pop(key, {})
        positions = sorted(rows)
        num_blocks, hidden_size = len(self._runtime.capture_blocks), self._runtime.hidden_size
        if not positions:
            return [], np.zeros((num_blocks, 0, hidden_size), dtype=np.float32)
        return positions, np.stack([rows[position] for position in positions], axis=1)
