"""Triggers: windows of token positions that open after one token sequence and close at another.

The windows are a pure function of the tokens. The device computes them row by row (`steer_kernels.trigger_windows` has
the rule); here they are computed once more from the tokens of a request, for the prefix cache, for answers, and for a
slot whose request begins in the middle.
"""

from __future__ import annotations

from array import array
from bisect import bisect_right
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

NO_END = 2**31 - 1
"""End of an open scope. Positions are int32 on the device."""

NEVER = -2
"""In place of a position: a sequence that has not occurred."""

FEW_TOKENS = 32
"""Below it, a Python loop is faster than NumPy."""


class Trigger(NamedTuple):
    """Windows from the token after `after` up to the last token of `until`, which is outside.

    after: token ids; empty = a window opens at the first token of the prompt. until: empty = windows stay open.
    each: after every occurrence, otherwise after the first only. A new window replaces an open one.
    tokens: length of a window at most.
    """

    after: tuple[int, ...] = ()
    until: tuple[int, ...] = ()
    each: bool = False
    tokens: int = NO_END

    def to_wire(self) -> list[list[int] | bool | int]:
        return [list(self.after), list(self.until), self.each, self.tokens]

    @classmethod
    def from_wire(cls, wire: Sequence[Sequence[int] | bool | int]) -> Trigger:
        after, until, each, tokens = wire
        assert isinstance(after, Sequence)
        assert isinstance(until, Sequence)
        assert isinstance(tokens, int)
        return cls(tuple(after), tuple(until), bool(each), tokens)


class Windows:
    """The windows of one trigger over a sequence of tokens that grows."""

    def __init__(self, trigger: Trigger) -> None:
        self._trigger = trigger
        self._tail: list[int] = []
        """The tokens that a sequence which ends later may begin with."""
        self.num_tokens = 0
        self._first = array("q")
        self._end = array("q")
        """[first, end) of each window, ascending; NO_END while a window is open. Arrays, since a client chooses how
        many there are."""
        self._opened = NEVER
        self._opened_before = NEVER
        self._closed = NEVER
        if not trigger.after:
            self._opened = self._opened_before = -1
            self._open(0)

    def extend(self, tokens: Sequence[int]) -> None:
        """The tokens that follow those seen so far."""
        if not len(tokens):
            return
        known = [*self._tail, *tokens]
        skip = len(self._tail)
        ends = dict.fromkeys(_ends(known, self._trigger.until, skip))
        opens = dict.fromkeys(_ends(known, self._trigger.after, skip))
        offset = self.num_tokens - skip
        for place in sorted(ends | opens):
            if place in ends:
                self._close(place + offset)
                self._closed = place + offset
            if place in opens and (self._trigger.each or self._opened == NEVER):
                self._close(place + offset + 1)
                self._opened_before, self._opened = self._opened, place + offset
                self._open(place + offset + 1)
        self.num_tokens += len(tokens)
        longest = max(len(self._trigger.after), len(self._trigger.until))
        self._tail = known[max(0, len(known) - longest + 1) :] if longest > 1 else []

    def within(self, start: int, end: int) -> list[tuple[int, int]]:
        """The parts [first, end) of the windows between two positions, ascending. A window that may still close is
        taken as open."""
        found = []
        for place in range(max(0, bisect_right(self._first, start) - 1), len(self._first)):
            first, last = max(self._first[place], start), min(self._end[place], end)
            if self._first[place] >= end:
                break
            if first < last:
                found.append((first, last))
        return found

    @property
    def num_bytes(self) -> int:
        """Memory of the windows."""
        return len(self._first) * self._first.itemsize + len(self._end) * self._end.itemsize

    @property
    def state(self) -> tuple[int, int]:
        """(opened, closed) at the last token, as the device keeps them: where `after` last ended before that token, and
        where `until` last ended up to it."""
        is_new = self._opened == self.num_tokens - 1 and self._opened >= 0
        return (self._opened_before if is_new else self._opened), self._closed

    def _open(self, first: int) -> None:
        end = NO_END if self._trigger.tokens == NO_END else first + self._trigger.tokens
        self._first.append(first)
        self._end.append(end)

    def _close(self, end: int) -> None:
        if self._first:
            self._end[-1] = max(self._first[-1], min(self._end[-1], end))


def _ends(tokens: Sequence[int], sequence: Sequence[int], skip: int) -> list[int]:
    """Where `sequence` ends in `tokens`, from index `skip` on."""
    size = len(sequence)
    if not size:
        return []
    if len(tokens) <= FEW_TOKENS:
        last = sequence[-1]
        return [
            place
            for place in range(max(skip, size - 1), len(tokens))
            if tokens[place] == last and list(tokens[place - size + 1 : place + 1]) == list(sequence)
        ]
    tokens_T = np.asarray(tokens)
    if len(tokens_T) < size:
        return []
    found_T = np.ones(len(tokens_T) - size + 1, dtype=bool)
    for offset, token in enumerate(sequence):
        found_T &= tokens_T[offset : len(tokens_T) - size + 1 + offset] == token
    places = found_T.nonzero()[0] + size - 1
    return [int(place) for place in places if place >= skip]
