"""Device rows of the vectors in use, shared by content and counted by reference."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch

from steer_engine.program import Row, RowKey


class Bank:
    """Which row of `bank_RD` holds what. R rows, D hidden size.

    A row whose last user left keeps its content until the place is needed, so that a vector in steady use is
    copied to the device once. Rows are rewritten on the stream that runs the steps: a step in flight has read
    the old content by then.
    """

    def __init__(self, bank_RD: torch.Tensor, make_row: Callable[[RowKey, int], np.ndarray]) -> None:
        self._bank_RD = bank_RD
        self._make_row = make_row
        self._row_of: dict[Row, int] = {}
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[Row, int] = OrderedDict()
        self._never_used = list(range(bank_RD.shape[0] - 1, -1, -1))

    @property
    def num_rows(self) -> int:
        return int(self._bank_RD.shape[0])

    @property
    def num_pinned(self) -> int:
        return len(self._users)

    @property
    def num_used(self) -> int:
        """Rows that hold a vector, whether or not a request uses it now."""
        return len(self._row_of)

    def can_pin(self, rows: Sequence[Row]) -> bool:
        """Whether `pin` would find room."""
        wanted = set(rows)
        new = sum(row not in self._row_of for row in wanted)
        reused = sum(row in self._idle for row in wanted)
        return new <= len(self._never_used) + len(self._idle) - reused

    def pin(self, rows: Sequence[Row]) -> list[int]:
        """Row numbers of `rows`, written to the device where they are new; each counts one user more."""
        assert self.can_pin(rows), "admission keeps the bank from being full"
        # Contents first: where one cannot be made, nothing has changed.
        new = {row: self._make_row(*row) for row in dict.fromkeys(rows) if row not in self._row_of}
        for row in rows:
            # Out of the idle ones before places are taken: a row of this very request must not make way for another.
            if row in self._idle:
                self._users[self._idle.pop(row)] = 0
        for row in new:
            self._row_of[row] = self._take_place()
            self._users[self._row_of[row]] = 0
        if new:
            self._write(new)
        numbers = [self._row_of[row] for row in rows]
        for number in numbers:
            self._users[number] += 1
        return numbers

    def unpin(self, rows: Sequence[Row]) -> None:
        """One user less for each of `rows`; rows without users may be overwritten from now on."""
        for row in rows:
            number = self._row_of[row]
            self._users[number] -= 1
            if self._users[number] == 0:
                del self._users[number]
                self._idle[row] = number

    def forget(self, digest: str) -> None:
        """Give up idle rows made from a vector that left the store."""
        for row in [row for row in self._idle if any(term[0] == digest for term in row[0].terms)]:
            self._never_used.append(self._idle.pop(row))
            del self._row_of[row]

    def _take_place(self) -> int:
        if self._never_used:
            return self._never_used.pop()
        row, number = self._idle.popitem(last=False)
        del self._row_of[row]
        return number

    def _write(self, new: dict[Row, np.ndarray]) -> None:
        content_ND = torch.from_numpy(np.stack(list(new.values())))
        index_N = torch.tensor([self._row_of[row] for row in new], dtype=torch.int64)
        device, dtype = self._bank_RD.device, self._bank_RD.dtype
        self._bank_RD.index_copy_(0, index_N.to(device), content_ND.to(dtype).to(device))
