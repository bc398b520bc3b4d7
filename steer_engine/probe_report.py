"""The numbers of probes in an answer: aligned with its tokens, or as a summary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from math import isfinite
from typing import Any

import numpy as np

from steer_engine.probe import Probe

Numbers = dict[str, dict[str, Any]]
"""Name of the probe -> block -> what is told about it."""


class ProbeAnswer:
    """The numbers of one sequence, as they arrive and as they are told. N rows, K columns (see `ProbePlan`)."""

    def __init__(self, probes: Sequence[Probe]) -> None:
        self._probes = probes
        self._prompt: list[np.ndarray] = []
        self._tokens: list[np.ndarray] = []
        num_columns = sum(len(probe.blocks) for probe in probes)
        self._total_K, self._count_K = np.zeros(num_columns), np.zeros(num_columns, dtype=np.int64)
        self._largest_K = np.full(num_columns, -np.inf)
        self._num_tokens = 0
        self._summarises = any(probe.returns == "summary" for probe in probes)
        self._calibrates = any(probe.platt for probe in probes)
        self.finished = False
        """Set after the last tokens: now a summary can be told."""

    def put(self, tokens_NK: np.ndarray, prompt_NK: np.ndarray | None = None) -> None:
        """Rows of tokens that follow those before, float32; NaN where a probe did not measure."""
        self._num_tokens += len(tokens_NK)
        for numbers_NK, parts in ((prompt_NK, self._prompt), (tokens_NK, self._tokens)):
            if numbers_NK is not None and len(numbers_NK):
                converted_NK = self._converted(numbers_NK)
                parts.append(converted_NK)
                if not self._summarises:
                    continue
                known_NK = np.isfinite(converted_NK)
                self._count_K += known_NK.sum(0)
                self._total_K += np.where(known_NK, converted_NK, 0.0).sum(0)
                self._largest_K = np.maximum(self._largest_K, np.where(known_NK, converted_NK, -np.inf).max(0))

    def pad(self, num_tokens: int) -> None:
        """Tokens without a row, at the end of an answer of `num_tokens`, have no number."""
        missing = num_tokens - self._num_tokens
        if missing > 0:
            self.put(np.full((missing, len(self._total_K)), np.nan, dtype=np.float32))

    def _converted(self, numbers_NK: np.ndarray) -> np.ndarray:
        """float64, with probabilities in place of dot products where the client asked for them."""
        numbers_NK = numbers_NK.astype(np.float64)
        for column, (probe, place) in enumerate(_columns(self._probes) if self._calibrates else ()):
            if probe.platt:
                numbers_NK[:, column] = [probe.platt[place].probability(dot) for dot in numbers_NK[:, column].tolist()]
        return numbers_NK

    def take(self) -> dict[str, Any]:
        """What has not been told: `probes` of generated tokens, `prompt_probes` of prompt tokens, each only if there is
        something; summaries once the answer is finished.
        """
        told: dict[str, Any] = {}
        for key, parts in (("prompt_probes", self._prompt), ("probes", self._tokens)):
            if parts:
                columns = np.concatenate(parts).T.tolist()
                numbers = self._told("tokens", lambda column: [_number(value) for value in columns[column]])  # noqa: B023
                if numbers:
                    told[key] = numbers
                parts.clear()
        if self.finished and (summaries := self._told("summary", self._summary)):
            told["probes"] = told.get("probes", {}) | summaries
        return told

    def _told(self, returns: str, of_column: Callable[[int], Any]) -> Numbers:
        found: Numbers = {}
        for column, (probe, place) in enumerate(_columns(self._probes)):
            if probe.returns == returns:
                found.setdefault(probe.name, {})[str(probe.blocks[place])] = of_column(column)
        return found

    def _summary(self, column: int) -> dict[str, Any]:
        count = int(self._count_K[column])
        if not count:
            return {"mean": None, "max": None, "tokens": 0}
        mean, largest = float(self._total_K[column]) / count, float(self._largest_K[column])
        return {"mean": _number(mean), "max": _number(largest), "tokens": count}


def _columns(probes: Sequence[Probe]) -> Iterator[tuple[Probe, int]]:
    """The columns of a row in order: the probe, and which of its blocks."""
    return ((probe, place) for probe in probes for place in range(len(probe.blocks)))


def _number(value: float) -> float | None:
    """With the nine digits that identify a float32 number; None where nothing was measured."""
    return float(f"{value:.9g}") if isfinite(value) else None
