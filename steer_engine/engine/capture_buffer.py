"""What the workers have read for requests that asked for it, until somebody takes it.

Nothing here bounds it: offline, the caller reads in chunks; a server lets only so many requests read at once, and takes
what was read even of those that are aborted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from steer_engine.engine.runtime import EngineRuntime
from steer_engine.program import Capture


@dataclass(frozen=True)
class _Planned:
    capture: Capture
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
        after: list[bool] = []
        self._planned = []
        start_row = 0
        for capture, first, count in zip(captures, first_positions, counts, strict=True):
            if capture is not None:
                for position in capture.within(first, count):
                    rows.append(start_row + position - first)
                    after.append(capture.after)
                    self._planned.append(_Planned(capture, position))
            start_row += count
        self._runtime.read(rows, after)

    def collect(self) -> None:
        """After a step: fetch what it read. A position that is computed again (preemption) is overwritten."""
        if not self._planned:
            return
        rows_LCD = self._runtime.captured(len(self._planned)).numpy()
        for c, planned in enumerate(self._planned):
            rows_LD = rows_LCD[self._places(planned.capture), c]
            self._read.setdefault(planned.capture.key, {})[planned.position] = rows_LD.copy()
        self._planned = []

    def take(self, key: str) -> tuple[list[int], np.ndarray]:
        """Positions in order, and float32 [L, P, D] with L the blocks that were asked; gone from here afterwards."""
        rows = self._read.pop(key, {})
        positions = sorted(rows)
        num_blocks, hidden_size = len(self._runtime.capture_blocks), self._runtime.hidden_size
        if not positions:
            return [], np.zeros((num_blocks, 0, hidden_size), dtype=np.float32)
        return positions, np.stack([rows[position] for position in positions], axis=1)

    @property
    def num_bytes(self) -> int:
        """What is held of requests whose rows nobody has taken yet."""
        return sum(rows_LD.nbytes for rows in list(self._read.values()) for rows_LD in list(rows.values()))

    def _places(self, capture: Capture) -> slice | list[int]:
        """Where the blocks of a capture are among those that this worker reads; the others belong to other stages."""
        if capture.blocks is None:
            return slice(None)
        here = self._runtime.capture_blocks
        return [here.index(block) for block in capture.blocks if block in here]
