"""What a worker keeps of requests until it is fetched: captured rows of the residual stream, and scores.

Nothing here bounds captured rows: offline, the caller captures in chunks; a server admits a few capturing requests at a
time, and drops the rows of aborted ones. Of scores, only numbers leave the worker, never a distribution; their
arithmetic is float64.

Shape suffixes: L capture points, P positions, D hidden size, C captured rows of a step, R rows of logits, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch

from steer_engine.capture import CaptureRequest
from steer_engine.engine.runtime import EngineRuntime
from steer_engine.program import Score

Numbers = dict[str, object]


class Taken(NamedTuple):
    """The rows of a capture request on this worker: float32 [L, P, D].

    points: those of the request that this worker has, ascending. positions: ascending.
    """

    points: tuple[int, ...]
    positions: list[int]
    rows_LPD: np.ndarray


MAX_TAKEN = 4096
"""Keys of fetched rows that are remembered: many times the requests that an engine runs or has preempted."""


class CaptureBuffer:
    """Plans which token rows of a step are captured, and keeps them by the key of their capture request.

    The device buffer of a step is read when the next step is prepared, or when rows are fetched, whichever is first.
    Positions come from the device as well: after drafts, the host does not know them.
    """

    def __init__(self, runtime: EngineRuntime) -> None:
        self._runtime = runtime
        self._requests: dict[str, CaptureRequest] = {}
        self._planned: list[CaptureRequest] = []
        """The capture request of each row of the last step, in order."""
        self._positions_C: torch.Tensor | None = None
        """The positions of these rows, on the device."""
        self._rows: dict[str, dict[int, np.ndarray]] = {}
        self._points: dict[str, tuple[int, ...]] = {}
        """The points of these rows."""
        self._taken: dict[str, None] = {}
        """The last keys that were fetched or dropped, oldest first."""

    def start(self, request_id: str, capture: CaptureRequest | None) -> None:
        """A request enters the batch."""
        if capture is not None and self._runtime.capture_blocks and capture.key not in self._taken:
            self._requests[request_id] = capture

    def stop(self, request_id: str) -> None:
        """A request leaves the batch."""
        self._requests.pop(request_id, None)

    def plan(
        self,
        request_ids: Sequence[str],
        first_positions_B: np.ndarray,
        counts_B: np.ndarray,
        positions_T: torch.Tensor,
    ) -> None:
        """Before a step of an engine that captures: mark the rows to capture.

        request_ids: the batch in row order. first_positions_B: first computed position of each request, as if all
        earlier drafts had been accepted. counts_B: token rows of each request. positions_T: the true position of each
        row, on the device.
        """
        rows: list[int] = []
        self._planned = []
        if self._requests:
            start_row = 0
            for request_id, first, count in zip(
                request_ids, first_positions_B.tolist(), counts_B.tolist(), strict=True
            ):
                capture = self._requests.get(request_id)
                if capture is not None:
                    for position in capture.within(first, count):
                        rows.append(start_row + position - first)
                        self._planned.append(capture)
                start_row += count
        self._runtime.capture(rows, [capture.after for capture in self._planned])
        if rows:
            # A copy: the runner writes the positions of the next step before these rows are read.
            self._positions_C = positions_T[torch.tensor(rows, dtype=torch.int64, device=positions_T.device)]

    def collect(self) -> None:
        """After a step: copy its rows to the host.

        A position that is computed again is overwritten: after a preemption, and where a draft was rejected.
        """
        if not self._planned:
            return
        assert self._positions_C is not None
        wanted = {capture.key: self._here(capture) for capture in self._planned}
        points = sorted(set().union(*wanted.values()))
        rows_LCD = self._runtime.captured(len(self._planned), points).numpy()
        place_of = {point: place for place, point in enumerate(points)}
        places = {key: [place_of[point] for point in mine] for key, mine in wanted.items()}
        for c, (capture, position) in enumerate(zip(self._planned, self._positions_C.tolist(), strict=True)):
            if capture.keeps(position):
                self._points[capture.key] = wanted[capture.key]
                # A copy: indexing with a list makes one.
                self._rows.setdefault(capture.key, {})[position] = rows_LCD[places[capture.key], c]
        self._planned = []

    def take(self, key: str, end: int | None = None) -> Taken:
        """The rows of a key at positions before `end`.

        All rows are forgotten, and nothing more is captured under the key, even if its request runs on.
        """
        self.collect()
        self._requests = {name: capture for name, capture in self._requests.items() if capture.key != key}
        self._taken[key] = None
        if len(self._taken) > MAX_TAKEN:
            del self._taken[next(iter(self._taken))]
        rows, points = self._rows.pop(key, {}), self._points.pop(key, self._runtime.capture_points)
        positions = sorted(position for position in rows if end is None or position < end)
        if not positions:
            return Taken(points, [], np.zeros((len(points), 0, self._runtime.hidden_size), dtype=np.float32))
        return Taken(points, positions, np.stack([rows[position] for position in positions], axis=1))

    @property
    def num_bytes(self) -> int:
        """Host memory of rows that were not fetched yet."""
        return sum(rows_LD.nbytes for rows in list(self._rows.values()) for rows_LD in list(rows.values()))

    def _here(self, capture: CaptureRequest) -> tuple[int, ...]:
        """The requested points that this worker captures; others belong to other stages."""
        here = self._runtime.capture_points
        return tuple(point for point in capture.points if point in here)


class Scores:
    """Reduces rows of logits to numbers, and stores these by key until they are taken.

    The distribution of a baseline is stored until `take`, because later rows are compared with it.
    """

    def __init__(self) -> None:
        self._planned: dict[int, Score] = {}
        self._baseline_V: dict[str, torch.Tensor] = {}
        self._numbers: dict[str, Numbers] = {}

    def plan(self, rows: Mapping[int, Score]) -> None:
        """Before a step: row of its logits -> the score to compute from it."""
        self._planned = dict(rows)

    @property
    def rows(self) -> list[int]:
        """The rows of the coming logits to pass to `reduce`, in this order."""
        return list(self._planned)

    def reduce(self, logits_RV: torch.Tensor) -> None:
        """After the forward pass: compute the planned scores.

        logits_RV: the logits of `rows`, in that order.
        """
        requested, self._planned = list(self._planned.values()), {}
        if not requested:
            return
        logprob_RV = torch.log_softmax(logits_RV.double(), dim=-1)
        for row, score in enumerate(requested):
            if score.key == score.baseline:
                # A copy: a view would keep all rows of the step in memory.
                self._baseline_V[score.key] = logprob_RV[row].clone()
        # Rows whose baseline has not been computed get no numbers; `take` returns None for them.
        known = [row for row, score in enumerate(requested) if score.baseline in self._baseline_V]
        if not known:
            return
        requested = [requested[row] for row in known]
        logprob_RV = logprob_RV[known]
        baseline_RV = torch.stack([self._baseline_V[score.baseline] for score in requested])
        kl_R = divergence(baseline_RV, logprob_RV).tolist()
        entropy_R = entropy(logprob_RV).tolist()
        top_R, baseline_top_R = logprob_RV.argmax(-1).tolist(), baseline_RV.argmax(-1).tolist()
        for row, score in enumerate(requested):
            self._numbers[score.key] = {
                "answers": logprob_RV[row, list(score.answers)].tolist(),
                "kl": kl_R[row],
                "entropy": entropy_R[row],
                "top_changed": top_R[row] != baseline_top_R[row],
            }

    def take(self, keys: list[str]) -> list[Numbers | None]:
        """Remove and return the numbers of `keys`, in order; None for what was not computed. Removes baselines too."""
        for key in keys:
            self._baseline_V.pop(key, None)
        return [self._numbers.pop(key, None) for key in keys]


def count_non_finite(hidden_TD: torch.Tensor, query_start_loc_B1: torch.Tensor) -> torch.Tensor:
    """int32 `[B]` on the device: the rows of each request whose final hidden state has a number that is not finite.

    query_start_loc_B1: the first row of each request, and the end of the last one.
    """
    sums_T = hidden_TD.sum(-1, dtype=torch.float32)
    # x - x is 0 for a finite x, and NaN otherwise.
    broken_T = (sums_T - sums_T).ne(0)
    if len(broken_T) == len(query_start_loc_B1) - 1:  # one row per request
        return broken_T.int()
    before_T1 = torch.nn.functional.pad(broken_T.cumsum(0), (1, 0))
    return before_T1[query_start_loc_B1[1:]].sub_(before_T1[query_start_loc_B1[:-1]]).int()


def divergence(baseline_RV: torch.Tensor, logprob_RV: torch.Tensor) -> torch.Tensor:
    """KL(baseline || distribution) in nats, `[R]`. A token with baseline probability 0 adds nothing.

    Both arguments are log-probabilities.
    """
    terms_RV = baseline_RV.exp() * (baseline_RV - logprob_RV)
    # Rounding can make a zero negative. The clamp leaves NaN as it is.
    return torch.where(baseline_RV == -torch.inf, 0.0, terms_RV).sum(-1).clamp(min=0.0)


def entropy(logprob_RV: torch.Tensor) -> torch.Tensor:
    """Shannon entropy in nats, `[R]`, of log-probabilities."""
    terms_RV = logprob_RV.exp() * logprob_RV
    return -torch.where(logprob_RV == -torch.inf, 0.0, terms_RV).sum(-1).clamp(max=0.0)
