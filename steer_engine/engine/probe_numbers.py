"""The numbers of one request's probes in the engine core: kept by position until their tokens are returned.

Generated token g is chosen by the stream at position P-1+g, with P prompt tokens: that row has its numbers. They are
kept by position: rows come again after a preemption, and rows of rejected drafts are followed by the right ones.
"""

from __future__ import annotations

import numpy as np

from steer_engine.probe import ProbePlan


class ProbeNumbers:
    """Numbers of one request. K columns (see `ProbePlan`), N rows of tokens, M rows of prompt tokens: all but the last
    one if a probe measures any of these, otherwise none.
    """

    def __init__(self, plan: ProbePlan, prompt_len: int) -> None:
        self._plan = plan
        self._first_token = prompt_len - 1
        """The position that chooses the first generated token."""
        num_prompt_rows = self._first_token if plan.start < self._first_token else 0
        self._num_columns = plan.num_columns
        self.num_own = plan.num_own_columns
        """The columns of the request's own probes; those of monitors follow."""
        self._missing_K = np.full(self._num_columns, np.nan, dtype=np.float32)
        self._prompt_MK = np.full((num_prompt_rows, self._num_columns), np.nan, dtype=np.float32)
        self._rows: dict[int, np.ndarray] = {}
        self._num_returned = 0
        self._in_a_row = [0] * len(plan.stops)

    @property
    def has_stops(self) -> bool:
        return bool(self._plan.stops)

    def write(self, positions_N: np.ndarray, numbers_NK: np.ndarray) -> None:
        """Rows that a step computed. What they hold for tokens that were returned before is ignored."""
        numbers_NK = numbers_NK[:, : self._num_columns]
        next_token = self._first_token + self._num_returned
        if len(self._prompt_MK):
            in_prompt_N = positions_N < self._first_token
            self._prompt_MK[positions_N[in_prompt_N]] = numbers_NK[in_prompt_N]
            positions_N, numbers_NK = positions_N[~in_prompt_N], numbers_NK[~in_prompt_N]
        # Most steps bring one row: plain Python takes a fraction of what numpy calls take.
        for row, position in enumerate(positions_N.tolist()):
            if position >= next_token:
                self._rows[position] = numbers_NK[row]

    def stopped_by(self, num_tokens: int, count: int, min_tokens: int = 0) -> tuple[int, str] | None:
        """Whether a stop rule ends the answer within the `count` tokens that follow its first `num_tokens`.

        Called once for all tokens, in order. min_tokens: the answer has at least so many. Returns how many of the
        tokens remain, and the name of the probe.
        """
        for kept in range(1, count + 1):
            row_K = self._rows.get(self._first_token + num_tokens + kept - 1)
            fired = None
            for number, rule in enumerate(self._plan.stops):
                holds = row_K is not None and rule.holds(float(row_K[rule.column]))
                self._in_a_row[number] = self._in_a_row[number] + 1 if holds else 0
                if self._in_a_row[number] >= rule.tokens and num_tokens + kept >= min_tokens:
                    fired = fired or rule.probe
            if fired is not None:
                return kept, fired
        return None

    def take(self, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The numbers of the next `count` tokens as float32 [N, K], and with the first ones those of the prompt [M, K].

        NaN where a probe did not measure.
        """
        prompt_MK = self._prompt_MK
        self._prompt_MK = prompt_MK[:0]
        next_token = self._first_token + self._num_returned
        rows = [self._rows.pop(position, self._missing_K) for position in range(next_token, next_token + count)]
        self._num_returned += count
        return prompt_MK, np.array(rows, dtype=np.float32)
