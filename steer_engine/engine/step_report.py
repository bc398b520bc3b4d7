"""What a worker tells the engine core about a step, beside vLLM's own output of it.

Shape suffixes: B requests of the batch, N token rows, K numbers of a row.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


@dataclass(frozen=True, kw_only=True)
class ProbedRows:
    """The numbers of probes at the token rows of some requests, request by request.

    request_ids, counts: whose rows follow each other, and how many they are. positions_N: int64, of the rows' tokens.
    numbers_NK: float32; NaN where a probe did not measure.
    """

    request_ids: list[str]
    counts: list[int]
    positions_N: np.ndarray
    numbers_NK: np.ndarray


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """Arrays may be filled by copies from the device that still run: read them once vLLM has its sampled tokens.

    request_ids: the batch in row order. non_finite_B: int32, rows of each request whose final hidden state has a number
    that is not finite; None if no request is steered. probed: None if no request has probes.
    """

    request_ids: list[str]
    non_finite_B: np.ndarray | None = None
    probed: ProbedRows | None = None

    @property
    def broken(self) -> list[str]:
        """The requests with such a row."""
        if self.non_finite_B is None or not self.non_finite_B.any():
            return []
        return [name for name, count in zip(self.request_ids, self.non_finite_B.tolist(), strict=True) if count]


def to_host(tensor: torch.Tensor) -> np.ndarray:
    """A copy in host memory. From a GPU the copy is not waited for: it follows the work that was launched before."""
    if tensor.device.type == "cpu":
        return tensor.clone().numpy()
    return tensor.to("cpu", non_blocking=True).numpy()
