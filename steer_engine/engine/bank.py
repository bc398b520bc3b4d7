"""The vectors of a worker: in host memory, and their rows on the device.

    Store       vectors by digest, in host memory
    Bank        assigns directions to rows of `bank_RD` on the device, and counts the users of each row

Shape suffixes: R bank rows, D hidden size, N rows written at once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import islice

import numpy as np
import torch

from steer_engine.engine.admission import MAX_LISTED
from steer_engine.program import Row, RowKey
from steer_engine.site import block_of
from steer_engine.vectors import ControlVector


class Store:
    """Control vectors by digest. A worker can steer with these vectors only."""

    def __init__(self) -> None:
        self._vectors: dict[str, ControlVector] = {}
        self.num_bytes = 0
        """Bytes of all directions. Kept up to date, since every status report needs it."""

    def __contains__(self, digest: str) -> bool:
        return digest in self._vectors

    def __len__(self) -> int:
        return len(self._vectors)

    def digests(self) -> list[str]:
        """The digests of at most MAX_LISTED vectors, the newest ones, sorted."""
        return sorted(islice(reversed(self._vectors), MAX_LISTED))

    def put(self, vector: ControlVector) -> None:
        self.drop(vector.digest)
        self._vectors[vector.digest] = vector
        self.num_bytes += _num_bytes(vector)

    def drop(self, digest: str) -> None:
        dropped = self._vectors.pop(digest, None)
        if dropped is not None:
            self.num_bytes -= _num_bytes(dropped)

    def row(self, key: RowKey, point: int) -> np.ndarray:
        """float32 [D]: the weighted sum of the key's vectors at the block of `point`; of length 1 if `key.unit`."""
        total_D: np.ndarray | None = None
        for digest, weight in key.terms:
            direction_D = self._vectors[digest].directions[block_of(point)]
            # Summed in float64, so that the order of the terms does not change the float32 result.
            term_D = direction_D.astype(np.float64) * weight
            total_D = term_D if total_D is None else total_D + term_D
        assert total_D is not None, "a row has at least one term"
        if key.unit:
            total_D = total_D / np.linalg.norm(total_D)
        return total_D.astype(np.float32)


def _num_bytes(vector: ControlVector) -> int:
    return sum(row.nbytes for row in vector.directions.values())


class Bank:
    """Assigns rows of `bank_RD` to directions, and counts the users of each row.

    A row without users keeps its content until its place is needed, so a vector in steady use is copied to the device
    once. Rows are written on the stream that runs the steps, so a step that is already launched reads the old content.

    bank_RD: [R, D] on the device, in the dtype of the residual stream.
    make_row: the content of a row, float32 [D].
    """

    def __init__(self, bank_RD: torch.Tensor, make_row: Callable[[RowKey, int], np.ndarray]) -> None:
        self._bank_RD = bank_RD
        self._make_row = make_row
        self._row_of: dict[Row, int] = {}
        self._users: dict[int, int] = {}
        self._idle: OrderedDict[Row, int] = OrderedDict()
        self._free = list(range(bank_RD.shape[0] - 1, -1, -1))

    @property
    def num_rows(self) -> int:
        return int(self._bank_RD.shape[0])

    @property
    def num_pinned(self) -> int:
        """Rows with at least one user."""
        return len(self._users)

    @property
    def num_used(self) -> int:
        """Rows that contain a direction, with or without users."""
        return len(self._row_of)

    def can_pin(self, rows: Sequence[Row]) -> bool:
        """Whether `pin` would find room."""
        distinct = set(rows)
        new = sum(row not in self._row_of for row in distinct)
        reused = sum(row in self._idle for row in distinct)
        return new <= len(self._free) + len(self._idle) - reused

    def pin(self, rows: Sequence[Row]) -> list[int]:
        """Row numbers of `rows`, each with one more user. New rows are written to the device."""
        assert self.can_pin(rows), "admission prevents a full bank"
        # Contents first: if one of them cannot be made, nothing has changed.
        new = {row: self._make_row(*row) for row in dict.fromkeys(rows) if row not in self._row_of}
        for row in rows:
            # Before rows are evicted, so that one row of this request cannot evict another one.
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
        """Remove one user from each of `rows`. Rows without users may be overwritten from now on."""
        for row in rows:
            number = self._row_of[row]
            self._users[number] -= 1
            if self._users[number] == 0:
                del self._users[number]
                self._idle[row] = number

    def forget(self, digest: str) -> None:
        """Free the rows without users that were made from a vector that has been dropped from the store."""
        for row in [row for row in self._idle if any(term[0] == digest for term in row[0].terms)]:
            self._free.append(self._idle.pop(row))
            del self._row_of[row]

    def _take_place(self) -> int:
        """The number of a free row, or of the row that has had no users for the longest time."""
        if self._free:
            return self._free.pop()
        row, number = self._idle.popitem(last=False)
        del self._row_of[row]
        return number

    def _write(self, new: dict[Row, np.ndarray]) -> None:
        content_ND = torch.from_numpy(np.stack(list(new.values())))
        index_N = torch.tensor([self._row_of[row] for row in new], dtype=torch.int64)
        device, dtype = self._bank_RD.device, self._bank_RD.dtype
        self._bank_RD.index_copy_(0, index_N.to(device), content_ND.to(dtype).to(device))
