"""Timing of one run of a load, measured in the arm."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True, kw_only=True)
class Timing:
    """seconds: from the first request to the last token.

    ttft_ms, itl_ms: time to first token and inter-token latency, medians over the requests.
    cached_tokens: prompt tokens from the prefix cache.
    prompt_logprobs: with check=True, the mean log-probability of each prompt's tokens (nats), to show that steering
        changed it.
    applied: with check=True, the steering that the engine applied.
    """

    seconds: float
    output_tokens: int
    prompt_tokens: int
    ttft_ms: float
    itl_ms: float
    cached_tokens: int = 0
    prompt_logprobs: list[float] = field(default_factory=list)
    applied: dict[str, Any] = field(default_factory=dict)

    @property
    def tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Timing:
        return cls(**raw)


class Stopwatch:
    """Records the token times of a run."""

    def __init__(self) -> None:
        self._start = time.perf_counter()
        self._entered: dict[int, float] = {}
        self._first: dict[int, float] = {}
        self._last: dict[int, tuple[float, int]] = {}

    def enter(self, request: int) -> None:
        self._entered[request] = time.perf_counter()

    def tokens(self, request: int, num_tokens: int) -> None:
        """Record that the request has `num_tokens` output tokens now."""
        now = time.perf_counter()
        if num_tokens and request not in self._first:
            self._first[request] = now
        self._last[request] = (now, num_tokens)

    def stop(self, *, output_tokens: int, prompt_tokens: int, **more: Any) -> Timing:
        seconds = time.perf_counter() - self._start
        first = [self._first[request] - self._entered[request] for request in self._first]
        gaps = [
            (self._last[request][0] - self._first[request]) / (self._last[request][1] - 1)
            for request in self._first
            if self._last[request][1] > 1
        ]
        return Timing(
            seconds=seconds,
            output_tokens=output_tokens,
            prompt_tokens=prompt_tokens,
            ttft_ms=1e3 * float(np.median(first)) if first else float("nan"),
            itl_ms=1e3 * float(np.median(gaps)) if gaps else float("nan"),
            **more,
        )
