"""What a request wants to read of the residual stream, once its blocks are checked and its key is chosen."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from steer_engine.errors import SteeringRequestError
from steer_engine.program import Capture

CAPTURE_KEY = "_steer_capture"
"""Key of `SamplingParams.extra_args` for a `CaptureRequest`; being no plain data, none can come from a client."""

PARAM = "steering.capture"
"""The field of a request that asks."""

Positions = str | tuple[int, ...]
"""`"last"`, `"mean"` or `"all"` of the prompt, or token numbers; negative ones count from the prompt's end."""

WORDS = ("last", "mean", "all")


@dataclass(frozen=True, kw_only=True)
class CaptureRequest:
    """Rows of one prompt at `blocks` (None: wherever the engine reads), before the block's edit or `after` it.

    key: what the rows are fetched by. max_rows: token rows that may be read and returned (None: any number).
    """

    key: str
    positions: Positions
    blocks: tuple[int, ...] | None = None
    after: bool = False
    max_rows: int | None = None

    def at(self, prompt_len: int) -> Capture:
        """What the workers read of a prompt of `prompt_len` tokens.

        Raises:
            SteeringRequestError: a position that the prompt has not, or more rows than are allowed.
        """
        wanted = self._numbers(prompt_len)
        if self.max_rows is not None and len(wanted) > self.max_rows:
            raise SteeringRequestError(
                f"{PARAM}: {len(wanted)} token rows at these blocks are more than this server returns "
                f"(max_capture_bytes); at most {self.max_rows}. Ask for fewer blocks or positions.",
                f"{PARAM}.positions",
            )
        numbers = tuple(sorted(set(wanted)))
        return Capture(
            key=self.key,
            start=numbers[0],
            end=numbers[-1] + 1,
            only=None if len(numbers) == numbers[-1] + 1 - numbers[0] else numbers,
            blocks=self.blocks,
            after=self.after,
        )

    def arranged(self, rows_LPD: np.ndarray, prompt_len: int) -> tuple[list[int], np.ndarray]:
        """Rows as the workers read them, in the order asked: their positions, and float32 `[blocks, rows, D]`.

        A mean is one row, summed in float64, of all positions.
        """
        wanted = self._numbers(prompt_len)
        numbers = sorted(set(wanted))
        if rows_LPD.shape[1] != len(numbers):
            raise RuntimeError(f"{len(numbers)} token rows were to be read, and {rows_LPD.shape[1]} were.")
        if self.positions == "mean":
            mean_L1D: np.ndarray = rows_LPD.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
            return numbers, mean_L1D
        place = {number: i for i, number in enumerate(numbers)}
        return list(wanted), rows_LPD[:, [place[number] for number in wanted]]

    def _numbers(self, prompt_len: int) -> range | list[int]:
        """Positions as they are asked, counted from the prompt's beginning."""
        if isinstance(self.positions, str):
            return range(prompt_len - 1 if self.positions == "last" else 0, prompt_len)
        for number in self.positions:
            if not -prompt_len <= number < prompt_len:
                raise SteeringRequestError(
                    f"{PARAM}.positions: the prompt has {prompt_len} tokens, and no position {number}.",
                    f"{PARAM}.positions",
                )
        return [number % prompt_len for number in self.positions]
