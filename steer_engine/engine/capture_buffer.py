"""The rows of the residual stream that a worker has captured, until they are fetched.

Nothing here bounds them: offline, the caller captures in chunks; a server admits a few capturing requests at a time,
and drops the rows of aborted ones.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from steer_engine.capture import CaptureRequest
from steer_engine.engine.runtime import EngineRuntime


class CaptureBuffer:
    """Plans which token rows of a step are captured, and keeps them by the key of their capture request.

    The device buffer of a step is read when the next step is prepared, or when rows are fetched, whichever is first.

    Shape suffixes: L capture blocks, P positions, D hidden size, C captured rows of a step.
    """

    def __init__(self, runtime: EngineRuntime) -> None:
        self._runtime = runtime
        self._requests: dict[str, CaptureRequest] = {}
        self._planned: list[tuple[CaptureRequest, int]] = []
        """The rows of the last step in order: capture request and position."""
        self._rows: dict[str, dict[int, np.ndarray]] = {}

    def start(self, request_id: str, capture: CaptureRequest | None) -> None:
        """A request enters the batch."""
        if capture is not None and self._runtime.capture_blocks:
            self._requests[request_id] = capture

    def stop(self, request_id: str) -> None:
        """A request leaves the batch."""
        self._requests.pop(request_id, None)

    def plan(self, request_ids: Sequence[str], first_positions: Callable[[], np.ndarray], counts: np.ndarray) -> None:
        """Before a step: mark the rows to capture.

        request_ids: the batch in row order. first_positions: first computed position of each request. counts: token
        rows of each request.
        """
        if not self._runtime.capture_blocks:
            return
        rows: list[int] = []
        self._planned = []
        if self._requests:
            start_row = 0
            for request_id, first, count in zip(request_ids, first_positions().tolist(), counts.tolist(), strict=True):
                capture = self._requests.get(request_id)
                if capture is not None:
                    for position in capture.within(first, count):
                        rows.append(start_row + position - first)
                        self._planned.append((capture, position))
                start_row += count
        self._runtime.capture(rows, [capture.after for capture, _ in self._planned])

    def collect(self) -> None:
        """After a step: copy its rows to the host. A position that is computed again (preemption) is overwritten."""
        if not self._planned:
            return
        rows_LCD = self._runtime.captured(len(self._planned)).numpy()
        for c, (capture, position) in enumerate(self._planned):
            rows_LD = rows_LCD[self._places(capture), c]
            self._rows.setdefault(capture.key, {})[position] = rows_LD.copy()
        self._planned = []

    def take(self, key: str) -> tuple[list[int], np.ndarray]:
        """Positions in order, and float32 [L, P, D] with L the requested blocks of this worker.

        The rows are forgotten, and nothing more is captured under the key.
        """
        self.collect()
        self._requests = {name: capture for name, capture in self._requests.items() if capture.key != key}
        rows = self._rows.pop(key, {})
        positions = sorted(rows)
        if not positions:
            shape = (len(self._runtime.capture_blocks), 0, self._runtime.hidden_size)
            return [], np.zeros(shape, dtype=np.float32)
        return positions, np.stack([rows[position] for position in positions], axis=1)

    @property
    def num_bytes(self) -> int:
        """Host memory of rows that were not fetched yet."""
        return sum(rows_LD.nbytes for rows in list(self._rows.values()) for rows_LD in list(rows.values()))

    def _places(self, capture: CaptureRequest) -> slice | list[int]:
        """Where the requested blocks are among those that this worker captures; others belong to other stages."""
        if capture.blocks is None:
            return slice(None)
        here = self._runtime.capture_blocks
        return [here.index(block) for block in capture.blocks if block in here]
