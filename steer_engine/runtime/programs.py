"""The compiled programs of running requests, one slot each, as the kernels read them."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import torch
from steer_kernels.tables import GATE_ROW, NUM_WORDS, ROW, Entry, Tables, encode_entry

from steer_engine.program import Program, Row
from steer_engine.runtime.bank import Bank


class Programs:
    """Writes a request's program into its slot when it is admitted, and clears it when it leaves.

    S slots (0 = never used), L armed sites, E entries a site, W words an entry. elsewhere: blocks that other stages of
    a pipeline arm.
    """

    def __init__(
        self, tables: Tables, bank: Bank, armed_blocks: tuple[int, ...], elsewhere: Collection[int] = ()
    ) -> None:
        self._tables = tables
        self._bank = bank
        self._site_of = {block: site for site, block in enumerate(armed_blocks)}
        self._elsewhere = frozenset(elsewhere)
        self._pinned: dict[int, list[Row]] = {}
        self._by_reference: set[int] = set()

    @property
    def steered_slots(self) -> set[int]:
        return set(self._pinned)

    def need_reference(self, slot_T: torch.Tensor) -> bool:
        """Whether a program in these slots has a gate or keeps norms, which plans do not know (host tensors only)."""
        return bool(self._by_reference) and not self._by_reference.isdisjoint(torch.unique(slot_T).tolist())

    def admit(self, slot: int, program: Program) -> None:
        """Write `program` into `slot`. The slot must be free; programs without sites here leave it unsteered."""
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
                named = {ROW: entry.row}
                if entry.gate is not None:
                    named[GATE_ROW], min_cos, max_cos = entry.gate
                    words = words._replace(gate_row=0, min_cos=min_cos, max_cos=max_cos)
                entries_LEW[sites, e] = encode_entry(words)
                for word, key in named.items():
                    rows += [(key, block) for block in blocks]
                    places += [(site, e, word) for site in sites]
        # In one go, after all that could fail: then nothing has changed, and the device is written once.
        entries_LEW[tuple(np.transpose(places))] = self._bank.pin(rows)
        self._pinned[slot] = rows
        if program.keep_norm or any(entry.gate is not None for _, entries in here for entry in entries):
            self._by_reference.add(slot)
        placed = [(entry.start, entry.end) for _, entries in here for entry in entries]
        span_2 = [min(start for start, _ in placed), max(end for _, end in placed)]
        tables = self._tables
        _write(tables.entries_SLEW[slot], entries_LEW)
        _write(tables.counts_SL[slot], counts_L)
        _write(tables.keep_norm_S[slot : slot + 1], np.array([program.keep_norm], dtype=np.int32))
        _write(tables.span_S2[slot], np.array(span_2, dtype=np.int32))

    def release(self, slot: int) -> None:
        """The slot's request has left; nothing happens for a slot that is not steered."""
        pinned = self._pinned.pop(slot, None)
        if pinned is None:
            return
        self._by_reference.discard(slot)
        self._bank.unpin(pinned)
        self._tables.span_S2[slot] = 0
        self._tables.counts_SL[slot] = 0


def _write(target: torch.Tensor, content: np.ndarray) -> None:
    # From pageable memory: the copy has read `content` when it returns, and is ordered after the steps in flight.
    target.copy_(torch.from_numpy(content))
