"""Capturing rows of the residual stream: which token positions of a request, at which blocks.

Three types carry a capture: `CaptureSpec` (what the client wrote, in `spec`), `CaptureRequest` (here: checked, with a
key), and `CaptureBuffer` (in the worker: the rows until they are fetched by that key).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from steer_engine.errors import SteeringRequestError

PARAM = "steering.capture"
"""The request field, for error messages."""

WORDS = ("last", "mean", "all")

Positions = str | range | tuple[int, ...]
"""One of WORDS, or token numbers; negative numbers count from the end of the prompt."""


@dataclass(frozen=True, kw_only=True)
class CaptureRequest:
    """Rows of one prompt at `blocks` (None: every block that the engine captures), before the block's edit or `after`.

    key: the captured rows are fetched by it. max_rows: upper bound on token rows (None: no bound).
    """

    key: str
    positions: Positions
    blocks: tuple[int, ...] | None = None
    after: bool = False
    max_rows: int | None = None

    def at(self, prompt_len: int) -> CaptureRequest:
        """The same request with absolute positions, ascending and without repeats, as the workers take it.

        Raises:
            SteeringRequestError: a position is outside the prompt, or there are more rows than `max_rows`.
        """
        requested = self._numbers(prompt_len)
        if self.max_rows is not None and len(requested) > self.max_rows:
            raise SteeringRequestError(
                f"{PARAM}: {len(requested)} token rows at these blocks exceed the limit of {self.max_rows} "
                "(max_capture_bytes). Request fewer blocks or positions.",
                f"{PARAM}.positions",
            )
        numbers = requested if isinstance(requested, range) else tuple(sorted(set(requested)))
        return replace(self, positions=numbers, max_rows=None)

    def within(self, first: int, count: int) -> Sequence[int]:
        """The positions to capture among the `count` from `first` on; only for a request returned by `at`."""
        assert not isinstance(self.positions, str)
        if isinstance(self.positions, range):
            return range(max(first, self.positions.start), min(first + count, self.positions.stop))
        return [position for position in self.positions if first <= position < first + count]

    def arranged(self, rows_LPD: np.ndarray, prompt_len: int) -> tuple[list[int], np.ndarray]:
        """Captured rows in the requested order: their positions, and float32 `[blocks, rows, D]`.

        rows_LPD: as the workers return them, positions ascending. A mean is one row, summed in float64.
        """
        requested = self._numbers(prompt_len)
        numbers = sorted(set(requested))
        if rows_LPD.shape[1] != len(numbers):
            raise RuntimeError(f"{len(numbers)} token rows were expected, {rows_LPD.shape[1]} were captured.")
        if self.positions == "mean":
            mean_L1D: np.ndarray = rows_LPD.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
            return numbers, mean_L1D
        index = {number: i for i, number in enumerate(numbers)}
        return list(requested), rows_LPD[:, [index[number] for number in requested]]

    def report(self) -> dict[str, Any]:
        """The `capture` object of an answer, before the rows are there."""
        positions = self.positions if isinstance(self.positions, str) else list(self.positions)
        return {"blocks": list(self.blocks or ()), "positions": positions, "after": self.after}

    def to_wire(self) -> list[Any]:
        """Plain data, for a request returned by `at`."""
        positions = self.positions
        span = [positions.start, positions.stop] if isinstance(positions, range) else None
        blocks = None if self.blocks is None else list(self.blocks)
        return [self.key, span, None if span else list(positions), blocks, self.after]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> CaptureRequest:
        key, span, numbers, blocks, after = wire
        return cls(
            key=key,
            positions=range(*span) if span else tuple(numbers),
            blocks=None if blocks is None else tuple(blocks),
            after=after,
        )

    def _numbers(self, prompt_len: int) -> range | list[int]:
        """Absolute positions in the requested order."""
        if isinstance(self.positions, str):
            return range(prompt_len - 1 if self.positions == "last" else 0, prompt_len)
        for number in self.positions:
            if not -prompt_len <= number < prompt_len:
                raise SteeringRequestError(
                    f"{PARAM}.positions: position {number} is outside the prompt, which has {prompt_len} tokens.",
                    f"{PARAM}.positions",
                )
        return [number % prompt_len for number in self.positions]
