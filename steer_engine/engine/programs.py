"""The programs of the slots: written into the tables when a request is admitted, cleared when it leaves.

Shape suffixes: S slots (0 = not steered), L armed sites, E entries per site, W words per entry, H positions of history,
J triggers, Q conditions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import torch
from steer_kernels.tables import (
    GATE_ROW,
    MAX_TRIGGERS,
    NUM_WORDS,
    PROBE_COLUMN,
    READ_ROW,
    ROW,
    TRIGGER_WORDS,
    Entry,
    Tables,
    encode_entry,
    encode_trigger,
)

from steer_engine.engine.bank import Bank
from steer_engine.program import Program, Row
from steer_engine.trigger import Trigger, Windows


class Programs:
    """Writes a request's program into its slot when the request is admitted, and clears the slot when it leaves.

    points: in the order of the tables. elsewhere: points of other pipeline stages. Their entries are skipped here.
    """

    def __init__(self, tables: Tables, bank: Bank, points: tuple[int, ...], elsewhere: Collection[int] = ()) -> None:
        self._tables = tables
        self._bank = bank
        self._site_of = {point: site for site, point in enumerate(points)}
        self._elsewhere = frozenset(elsewhere)
        self._pinned: dict[int, list[Row]] = {}
        self._measured_until_S = np.zeros(tables.counts_SL.shape[0], dtype=np.int32)
        """The positions before it are measured for conditions; 0 = none."""
        self.trigger_slots: set[int] = set()
        self.probe_slots: set[int] = set()
        self.watched_slots: set[int] = set()
        """Slots with nothing but monitors: their requests are not steered."""

    @property
    def steered_slots(self) -> set[int]:
        """Slots with a program, monitors included."""
        return set(self._pinned)

    @property
    def num_steered(self) -> int:
        """Slots with more than monitors."""
        return len(self._pinned) - len(self.watched_slots)

    def are_measured(self, slot_T: torch.Tensor, pos_T: torch.Tensor) -> bool:
        """Whether rows are measured for conditions, which a `StepPlan` does not support.

        slot_T, pos_T: [T] slot and position of each token row, in host memory.
        """
        return bool((pos_T.numpy() < self._measured_until_S[slot_T.numpy()]).any())

    def admit(self, slot: int, program: Program, tokens: Sequence[int] = (), measured: Sequence[float] = ()) -> None:
        """Write `program` into `slot`, which must be free. A program without sites here leaves the slot unsteered.

        tokens: those before the first position that will be computed; read only if the program has triggers.
        measured: the numbers of the conditions if they were measured before, for a request that comes back.
        """
        assert slot > 0, "slot 0 is never steered"
        assert slot not in self._pinned, f"slot {slot} is taken"
        here = [
            (points, group.entries)
            for group in program.sites
            if (points := [point for point in group.blocks if point not in self._elsewhere])
        ]
        if not here:
            return
        _, num_sites, num_entries, _ = self._tables.entries_SLEW.shape
        entries_LEW = np.zeros((num_sites, num_entries, NUM_WORDS), dtype=np.int32)
        counts_L = np.zeros(num_sites, dtype=np.int32)
        rows: list[Row] = []
        places: list[tuple[int, int, int]] = []
        for points, entries in here:
            sites = [self._site_of[point] for point in points]
            counts_L[sites] = len(entries)
            for e, entry in enumerate(entries):
                c0, c1, c2, c3, lo, hi = entry.coefficients
                words = Entry(0, entry.start, entry.end, c0, c1, c2, c3, lo, hi)
                row_words = {ROW: entry.row}
                if entry.gate is not None:
                    row_words[GATE_ROW], min_cos, max_cos = entry.gate
                    words = words._replace(gate_row=0, min_cos=min_cos, max_cos=max_cos)
                if entry.read is not None:
                    row_words[READ_ROW] = entry.read
                if entry.details is not None:
                    words = words._replace(**entry.details._asdict())
                    if entry.details.probe < 0 and entry.details.measure and len(measured):
                        words = words._replace(start=0, end=0)
                entries_LEW[sites, e] = encode_entry(words)
                if entry.details is not None and program.probes is not None and entry.details.probe >= 0:
                    columns = program.probes.columns(entry.details.probe)
                    entries_LEW[sites, e, PROBE_COLUMN] = [columns[point] for point in points]
                for word, key in row_words.items():
                    rows += [(key, point) for point in points]
                    places += [(site, e, word) for site in sites]
        bounds = [(entry.start, entry.end) for _, entries in here for entry in entries]
        span_2 = [min(start for start, _ in bounds), max(end for _, end in bounds)]
        # After everything that could fail, so that a failure changes nothing; and with one copy to the device.
        entries_LEW[tuple(np.transpose(places))] = self._bank.pin(rows)
        self._pinned[slot] = rows
        tables = self._tables
        _write(tables.entries_SLEW[slot], entries_LEW)
        _write(tables.counts_SL[slot], counts_L)
        _write(tables.keep_norm_S[slot : slot + 1], np.array([program.keep_norm], dtype=np.int32))
        _write(tables.span_S2[slot], np.array(span_2, dtype=np.int32))
        if program.triggers:
            self._write_triggers(slot, program.triggers, tokens)
        if program.conditions:
            self._write_conditions(slot, program, measured)
        if program.probes is not None:
            self.probe_slots.add(slot)
        if program.is_only_watched:
            self.watched_slots.add(slot)

    def _write_triggers(self, slot: int, triggers: Sequence[Trigger], tokens: Sequence[int]) -> None:
        """The triggers, and their history as if all of `tokens` had been computed in this slot."""
        tables, num_triggers = self._tables, len(triggers)
        num_positions = tables.history_SHC.shape[1]
        words_JP = np.zeros((num_triggers, TRIGGER_WORDS), dtype=np.int32)
        history_HC = np.full((num_positions, 1 + 2 * MAX_TRIGGERS), -1, dtype=np.int32)
        for position in range(max(0, len(tokens) - num_positions), len(tokens)):
            history_HC[position % num_positions, 0] = tokens[position]
        for j, trigger in enumerate(triggers):
            words_JP[j] = encode_trigger(trigger.after, trigger.until, each=trigger.each, length=trigger.tokens)
            windows = Windows(trigger)
            windows.extend(tokens)
            place = (len(tokens) - 1) % num_positions
            history_HC[place, 1 + j], history_HC[place, 1 + MAX_TRIGGERS + j] = windows.state
        _write(tables.triggers_SJP[slot, :num_triggers], words_JP)
        _write(tables.history_SHC[slot], history_HC)
        _write(tables.num_triggers_S[slot : slot + 1], np.array([num_triggers], dtype=np.int32))
        self.trigger_slots.add(slot)

    def _write_conditions(self, slot: int, program: Program, measured: Sequence[float]) -> None:
        start_Q = list(measured) or [-np.inf if condition.largest else 0.0 for condition in program.conditions]
        bounds_Q2 = np.array([(condition.low, condition.high) for condition in program.conditions])
        _write(self._tables.measured_SQ[slot, : len(start_Q)], np.array(start_Q))
        _write(self._tables.bounds_SQ2[slot, : len(start_Q)], bounds_Q2)
        self._measured_until_S[slot] = 0 if len(measured) else program.prompt_len

    def release(self, slot: int) -> None:
        """Clear the slot of a request that has left. Does nothing if the slot is not steered."""
        pinned = self._pinned.pop(slot, None)
        if pinned is None:
            return
        self._bank.unpin(pinned)
        self._tables.span_S2[slot] = 0
        self._tables.counts_SL[slot] = 0
        self._measured_until_S[slot] = 0
        self.probe_slots.discard(slot)
        self.watched_slots.discard(slot)
        if slot in self.trigger_slots:
            self.trigger_slots.remove(slot)
            self._tables.num_triggers_S[slot] = 0


def _write(target: torch.Tensor, content: np.ndarray) -> None:
    # `content` is pageable memory: the copy has finished reading it on return, and runs after the launched steps.
    target.copy_(torch.from_numpy(content))
