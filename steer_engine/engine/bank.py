"""The steering state of a worker: vectors in host memory, their rows on the device, and the programs of the slots.

    Store       vectors by digest, in host memory
    Bank        assigns directions to rows of `bank_RD` on the device, and counts the users of each row
    Programs    writes a request's program into the tables of its slot, and clears it

Shape suffixes: R bank rows, D hidden size, N rows written at once, S slots (0 = not steered), L armed sites, E entries
per site, W words per entry.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from itertools import islice

import numpy as np
import torch
from steer_kernels.tables import GATE_ROW, NUM_WORDS, ROW, Entry, Tables, encode_entry

from steer_engine.engine.admission import MAX_LISTED
from steer_engine.program import Program, Row, RowKey
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

    def row(self, key: RowKey, block: int) -> np.ndarray:
        """float32 [D]: the weighted sum of the key's vectors at `block`; normalised to length 1 if `key.unit`."""
        total_D: np.ndarray | None = None
        for digest, weight in key.terms:
            direction_D = self._vectors[digest].directions[block]
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


class Programs:
    """Writes a request's program into its slot when the request is admitted, and clears the slot when it leaves.

    elsewhere: blocks that other pipeline stages arm. Their entries are skipped here.
    """

    def __init__(
        self, tables: Tables, bank: Bank, armed_blocks: tuple[int, ...], elsewhere: Collection[int] = ()
    ) -> None:
        self._tables = tables
        self._bank = bank
        self._site_of = {block: site for site, block in enumerate(armed_blocks)}
        self._elsewhere = frozenset(elsewhere)
        self._pinned: dict[int, list[Row]] = {}
        self._reference_slots: set[int] = set()

    @property
    def steered_slots(self) -> set[int]:
        return set(self._pinned)

    def need_reference(self, slot_T: torch.Tensor) -> bool:
        """Whether a program in these slots has a gate or preserves norms. A `StepPlan` supports neither.

        slot_T: [T] slot of each token row, in host memory.
        """
        return bool(self._reference_slots) and not self._reference_slots.isdisjoint(torch.unique(slot_T).tolist())

    def admit(self, slot: int, program: Program) -> None:
        """Write `program` into `slot`, which must be free. A program without sites here leaves the slot unsteered."""
        assert slot > 0, "slot 0 is never steered"
        assert slot not in self._pinned, f"slot {slot} is taken"
        here = [
            (blocks, group.entries)
            for group in program.sites
            if (blocks := [block for block in group.blocks if block not in self._elsewhere])
        ]
        if not here:
            return
        _, num_sites, num_entries, _ = self._tables.entries_SLEW.shape
        entries_LEW = np.zeros((num_sites, num_entries, NUM_WORDS), dtype=np.int32)
        counts_L = np.zeros(num_sites, dtype=np.int32)
        rows: list[Row] = []
        places: list[tuple[int, int, int]] = []
        for blocks, entries in here:
            sites = [self._site_of[block] for block in blocks]
            counts_L[sites] = len(entries)
            for e, entry in enumerate(entries):
                c0, c1, c2, c3, lo, hi = entry.coefficients
                words = Entry(0, entry.start, entry.end, c0, c1, c2, c3, lo, hi)
                row_words = {ROW: entry.row}
                if entry.gate is not None:
                    row_words[GATE_ROW], min_cos, max_cos = entry.gate
                    words = words._replace(gate_row=0, min_cos=min_cos, max_cos=max_cos)
                entries_LEW[sites, e] = encode_entry(words)
                for word, key in row_words.items():
                    rows += [(key, block) for block in blocks]
                    places += [(site, e, word) for site in sites]
        # After everything that could fail, so that a failure changes nothing; and with one copy to the device.
        entries_LEW[tuple(np.transpose(places))] = self._bank.pin(rows)
        self._pinned[slot] = rows
        if program.keep_norm or any(entry.gate is not None for _, entries in here for entry in entries):
            self._reference_slots.add(slot)
        bounds = [(entry.start, entry.end) for _, entries in here for entry in entries]
        span_2 = [min(start for start, _ in bounds), max(end for _, end in bounds)]
        tables = self._tables
        _write(tables.entries_SLEW[slot], entries_LEW)
        _write(tables.counts_SL[slot], counts_L)
        _write(tables.keep_norm_S[slot : slot + 1], np.array([program.keep_norm], dtype=np.int32))
        _write(tables.span_S2[slot], np.array(span_2, dtype=np.int32))

    def release(self, slot: int) -> None:
        """Clear the slot of a request that has left. Does nothing if the slot is not steered."""
        pinned = self._pinned.pop(slot, None)
        if pinned is None:
            return
        self._reference_slots.discard(slot)
        self._bank.unpin(pinned)
        self._tables.span_S2[slot] = 0
        self._tables.counts_SL[slot] = 0


def _write(target: torch.Tensor, content: np.ndarray) -> None:
    # `content` is pageable memory: the copy has finished reading it on return, and runs after the launched steps.
    target.copy_(torch.from_numpy(content))
