"""Capturing rows of the residual stream: which token positions of a request, at which points (see `site`).

Three types carry a capture: `CaptureSpec` (what the client wrote, in `spec`), `CaptureRequest` (here: checked, with a
key), and `CaptureBuffer` (in the worker: the rows until they are fetched by that key).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from steer_engine.errors import SteeringRequestError
from steer_engine.site import Site, block_of, site_of

PARAM = "steering.capture"
"""The request field, for error messages."""

WORDS = ("last", "mean", "all")

Scope = Literal["prompt", "generation", "all"]
"""Which part of a sequence. The generation is every position whose row chose a token of the answer: from the last
prompt token to the token before the last one. That makes one row for each token of the answer."""

Positions = str | range | tuple[int, ...]
"""One of WORDS, or token numbers; negative numbers count from the end of the prompt."""


@dataclass(frozen=True, kw_only=True)
class CaptureRequest:
    """Rows of one sequence at ascending `points`, before the edits there or `after` them.

    key: the captured rows are fetched by it. points: of one request to a server, all at one site. positions: in
    `scope`; numbers only in the prompt. max_rows: upper bound on token rows (None: no bound).
    """

    key: str
    positions: Positions
    points: tuple[int, ...]
    scope: Scope = "prompt"
    after: bool = False
    max_rows: int | None = None

    @property
    def blocks(self) -> tuple[int, ...]:
        return tuple(map(block_of, self.points))

    @property
    def site(self) -> Site:
        """Of a request to a server."""
        return site_of(self.points[0])

    @property
    def reads_prompt(self) -> bool:
        """Whether it needs more of the prompt than its last token, which alone is never read from a prefix cache."""
        return self.scope != "generation"

    def at(self, prompt_len: int, max_tokens: int) -> CaptureRequest:
        """The same request with absolute positions, ascending and without repeats, as the workers take it.

        max_tokens: upper bound on the tokens of the answer.

        Raises:
            SteeringRequestError: a position is outside the prompt, or there could be more rows than `max_rows`.
        """
        requested = self._numbers(prompt_len, max_tokens)
        if self.max_rows is not None and len(requested) > self.max_rows:
            raise self._too_many(len(requested), self.max_rows, prompt_len, max_tokens)
        numbers = requested if isinstance(requested, range) else tuple(sorted(set(requested)))
        return replace(self, positions=numbers, max_rows=None)

    def within(self, first: int, count: int) -> Sequence[int]:
        """The positions to capture among the `count` from `first` on; only for a request returned by `at`.

        first: as the host counts. In an answer that may be too high, as if no draft had been rejected; there all rows
        are named, and `keeps` decides when the device has said where they are.
        """
        assert not isinstance(self.positions, str)
        if self.scope != "prompt":
            return range(max(first, self._span.start), first + count)
        if isinstance(self.positions, range):
            return range(max(first, self.positions.start), min(first + count, self.positions.stop))
        return [position for position in self.positions if first <= position < first + count]

    def keeps(self, position: int) -> bool:
        """Whether a row that `within` named is captured, by its true position."""
        return self.scope == "prompt" or position in self._span

    def end(self, prompt_len: int, num_tokens: int) -> int | None:
        """The position after the last one to return; None if the end of the answer does not matter.

        An engine may run past the end of an answer: a stop string is found later, and a step may be under way.

        num_tokens: of the answer, as it is returned.
        """
        return None if self.scope == "prompt" else prompt_len - 1 + num_tokens

    def arranged(self, rows_LPD: np.ndarray, prompt_len: int, num_tokens: int) -> tuple[list[int], np.ndarray]:
        """Captured rows in the requested order: their positions, and float32 `[points, rows, D]`.

        rows_LPD: as the workers return them, positions ascending, up to `end`. num_tokens: of the answer. A mean is one
        row, summed in float64; it and "last" have no row if no token was generated.
        """
        requested = self._numbers(prompt_len, num_tokens)
        numbers = sorted(set(requested))
        if rows_LPD.shape[1] != len(numbers):
            raise RuntimeError(f"{len(numbers)} token rows were expected, {rows_LPD.shape[1]} were captured.")
        if not numbers:
            return [], rows_LPD[: len(self.points)]
        if self.positions == "mean":
            mean_L1D: np.ndarray = rows_LPD.mean(axis=1, keepdims=True, dtype=np.float64).astype(np.float32)
            return numbers, mean_L1D
        if self.positions == "last":
            return numbers[-1:], rows_LPD[:, -1:]
        index = {number: i for i, number in enumerate(numbers)}
        return list(requested), rows_LPD[:, [index[number] for number in requested]]

    def report(self) -> dict[str, Any]:
        """The `capture` object of an answer, before the rows are there."""
        positions = self.positions if isinstance(self.positions, str) else list(self.positions)
        report = {"blocks": list(self.blocks), "positions": positions, "scope": self.scope, "after": self.after}
        return report if self.site is Site.BLOCK else report | {"site": self.site.value}

    def to_wire(self) -> list[Any]:
        """Plain data, for a request returned by `at`."""
        positions = self.positions
        span = [positions.start, positions.stop] if isinstance(positions, range) else None
        return [self.key, span, None if span else list(positions), list(self.points), self.after, self.scope]

    @classmethod
    def from_wire(cls, wire: list[Any]) -> CaptureRequest:
        key, span, numbers, points, after, scope = wire
        return cls(
            key=key,
            positions=range(*span) if span else tuple(numbers),
            points=tuple(points),
            after=after,
            scope=scope,
        )

    @property
    def _span(self) -> range:
        """The positions of a request returned by `at` whose scope is not the prompt."""
        assert isinstance(self.positions, range)
        return self.positions

    def _too_many(self, rows: int, limit: int, prompt_len: int, max_tokens: int) -> SteeringRequestError:
        if self.scope == "prompt":
            return SteeringRequestError(
                f"{PARAM}: {rows} token rows at these blocks exceed the limit of {limit} (max_capture_bytes). Request "
                "fewer blocks or positions.",
                f"{PARAM}.positions",
            )
        fitting = limit - (rows - max_tokens)
        step = f"Set max_tokens to at most {fitting}" if fitting > 0 else "Use scope 'generation' or a shorter prompt"
        return SteeringRequestError(
            f"{PARAM}: with a prompt of {prompt_len} tokens and an answer of up to {max_tokens}, scope {self.scope!r} "
            f"has up to {rows} token rows; at these blocks, they exceed the limit of {limit} (max_capture_bytes). "
            f"{step}, or request fewer blocks.",
            f"{PARAM}.scope",
        )

    def _numbers(self, prompt_len: int, num_tokens: int) -> range | list[int]:
        """Absolute positions in the requested order. With an answer, these are all of its scope: which one is the last
        is known when it has ended.
        """
        if self.scope != "prompt":
            return range(prompt_len - 1 if self.scope == "generation" else 0, prompt_len - 1 + num_tokens)
        if isinstance(self.positions, str):
            return range(prompt_len - 1 if self.positions == "last" else 0, prompt_len)
        for number in self.positions:
            if not -prompt_len <= number < prompt_len:
                raise SteeringRequestError(
                    f"{PARAM}.positions: position {number} is outside the prompt, which has {prompt_len} tokens.",
                    f"{PARAM}.positions",
                )
        return [number % prompt_len for number in self.positions]
