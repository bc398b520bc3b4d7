"""`advance_triggers`: interpreted and compiled kernel and NumPy reference against the definition, row by row.

Random requests run side by side: chunks of any size, drafts that are rejected, steps without a request, preemption.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from helpers.kernel_process import Process
from helpers.oracle_when import window_at
from helpers.ptx_machine import Machine
from steer_kernels.tables import MAX_POSITION, MAX_TRIGGER_TOKENS, MAX_TRIGGERS, Tables
from steer_kernels.trigger_windows import advance_triggers_reference

from steer_engine.engine.bank import Bank
from steer_engine.engine.programs import Programs
from steer_engine.program import Details, Entry, Program, RowKey, Sites
from steer_engine.trigger import NO_END, Trigger

NUM_SLOTS = 6
MAX_TOKENS = 700
STALE = 7
"""In `windows_TJ` before each step."""


def expected_window(trigger: Trigger, tokens: Sequence[int], position: int) -> int:
    """From the definition."""
    scope = {"each": trigger.each, "tokens": trigger.tokens}
    scope |= {name: list(part) for name, part in (("after", trigger.after), ("until", trigger.until)) if part}
    first = window_at(scope, tokens, position)
    return MAX_POSITION if first is None else first


def program_of(triggers: Sequence[Trigger]) -> Program:
    entry = Entry(row=RowKey(terms=(("digest", 1.0),)), c0=1.0, end=MAX_POSITION, details=Details(trigger=0))
    return Program(sites=(Sites((0,), (entry,)),), triggers=tuple(triggers))


Advance = Callable[[Sequence[torch.Tensor], Tables], None]


def by_reference(batch: Sequence[torch.Tensor], tables: Tables) -> None:
    advance_triggers_reference(*batch, tables)


def interpreted_by(process: Process) -> Advance:
    return lambda batch, tables: process.call("advance_triggers.advance_triggers", *batch, tables)


def compiled_by(process: Process, target: str) -> Advance:
    """The compiled code, in the emulator."""

    def advance(batch: Sequence[torch.Tensor], tables: Tables) -> None:
        artifact = process.call(
            *("compile.compile_advance_triggers", target),
            positions_dtype=batch[2].dtype,
            num_positions=tables.history_SHC.shape[1],
        )
        written = (tables.triggers_SJP, tables.num_triggers_S, tables.history_SHC, tables.windows_TJ)
        machine = Machine(artifact.text, [*batch, *written])
        for request in range(len(batch[1])):
            machine.run(request)

    return advance


class Side:
    """The tables of one implementation, and the programs in them."""

    def __init__(self, num_drafts: int, advance: Advance) -> None:
        self.tables = Tables.allocate(
            num_slots=NUM_SLOTS,
            num_sites=1,
            num_entries=1,
            num_rows=NUM_SLOTS,
            hidden_size=1,
            max_tokens=MAX_TOKENS,
            bank_dtype=torch.float32,
            num_drafts=num_drafts,
        )
        bank = Bank(self.tables.bank_RD, lambda key, block: np.ones(1, dtype=np.float32))
        self.programs = Programs(self.tables, bank, (0,))
        self._advance = advance

    def advance(self, *batch: torch.Tensor) -> None:
        self.tables.windows_TJ.fill_(STALE)
        self._advance(batch, self.tables)


@dataclass
class Running:
    """A request, and the tokens that it has computed and kept."""

    slot: int
    triggers: list[Trigger]
    tokens: list[int] = field(default_factory=list)


class Engine:
    """The kernel and the reference side by side; every step is compared with the definition."""

    def __init__(self, kernel: Advance, num_drafts: int, positions: torch.dtype = torch.int64) -> None:
        self.sides = (Side(num_drafts, kernel), Side(num_drafts, by_reference))
        self._positions = positions
        self.inside = self.outside = 0
        """How many rows were in a window of a trigger, and how many were not."""

    def admit(self, request: Running) -> None:
        for side in self.sides:
            side.programs.release(request.slot)
            side.programs.admit(request.slot, program_of(request.triggers), request.tokens)

    def step(self, *rows: tuple[Running | None, Sequence[int]]) -> None:
        """A step in which each request has these tokens. None: a request without steering."""
        counts = [len(tokens) for _, tokens in rows]
        firsts = [0 if request is None else len(request.tokens) for request, _ in rows]
        batch = (
            torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
            torch.tensor([-1 if request is None else request.slot - 1 for request, _ in rows], dtype=torch.int32),
            torch.cat([torch.arange(first, first + n) for first, n in zip(firsts, counts, strict=True)]).to(
                self._positions
            ),
            torch.tensor([token for _, tokens in rows for token in tokens], dtype=torch.int32),
        )
        for side in self.sides:
            side.advance(*batch)
        row = 0
        for request, new in rows:
            for place in range(len(new)):
                self._check_row(row, request, new[: place + 1])
                row += 1
        self._check_histories([request for request, _ in rows if request is not None])

    def _check_row(self, row: int, request: Running | None, new: Sequence[int]) -> None:
        triggers = [] if request is None else request.triggers
        tokens = [] if request is None else [*request.tokens, *new]
        expected = [expected_window(trigger, tokens, len(tokens) - 1) for trigger in triggers]
        for side in self.sides:
            found = side.tables.windows_TJ[row].tolist()
            assert found[: len(triggers)] == expected, (row, request, new)
            if request is None:
                assert found == [STALE] * MAX_TRIGGERS
        self.inside += sum(window != MAX_POSITION for window in expected)
        self.outside += sum(window == MAX_POSITION for window in expected)

    def _check_histories(self, requests: Sequence[Running]) -> None:
        """Both sides keep the same history of each request's own triggers."""
        for request in requests:
            one, other = (side.tables.history_SHC[request.slot] for side in self.sides)
            num = len(request.triggers)
            for part in (slice(1), slice(1, 1 + num), slice(1 + MAX_TRIGGERS, 1 + MAX_TRIGGERS + num)):
                assert torch.equal(one[:, part], other[:, part])


# Rules, one by one: tokens, trigger and the windows as strings, one character a position ("." = in none).

RULES = {
    "after": ("abcabc", Trigger((1,)), ".11111"),
    "a sequence": ("aabbab", Trigger((1, 2)), "...333"),
    "until": ("abcabc", Trigger((), (3,)), "00...."),
    "until only closes": ("cabcab", Trigger((1,), (3,)), "..2..."),
    "after each": ("abcabca", Trigger((1,), (3,), each=True), ".1..4.."),
    "each replaces an open window": ("ababa", Trigger((1,), each=True), ".1133"),
    "the first only": ("ababa", Trigger((1,)), ".1111"),
    "a limit": ("abbbbabb", Trigger((1,), (), each=True, tokens=2), ".11...66"),
    "a limit without after": ("abc", Trigger((), (3,), tokens=1), "0.."),
    "an end before the window": ("cab", Trigger((1,), (3,)), "..2"),
    "an end that overlaps the beginning": ("abca", Trigger((1, 2), (2, 3)), "...."),
    "begin and end at one token": ("aabcabc", Trigger((1, 2), (2,), each=True), "...33.6"),
    "overlapping sequences": ("aaaa", Trigger((1, 1), each=True), "..23"),
}


def windows_of(text: str) -> list[int]:
    return [MAX_POSITION if character == "." else int(character) for character in text]


@pytest.mark.parametrize("chunk", [1, 2, 7])
@pytest.mark.parametrize("name", RULES)
def test_a_rule(interpreted: Process, name: str, chunk: int) -> None:
    text, trigger, windows = RULES[name]
    tokens = ["?abc".index(character) for character in text]
    engine, request = Engine(interpreted_by(interpreted), num_drafts=0), Running(1, [trigger])
    engine.admit(request)
    found = []
    for start in range(0, len(tokens), chunk):
        new = tokens[start : start + chunk]
        engine.step((request, new))
        found += engine.sides[0].tables.windows_TJ[: len(new), 0].tolist()
        request.tokens += new
    assert found == windows_of(windows)


# Random requests


class Draws:
    """Tokens that repeat a short pattern with some noise, and triggers that are often parts of it."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self._pattern = self.rng.integers(1, 4, size=int(self.rng.integers(1, 5))).tolist()
        self._at = 0

    def number(self, low: int, high: int) -> int:
        """low <= number <= high."""
        return int(self.rng.integers(low, high + 1))

    def tokens(self, count: int) -> list[int]:
        found = []
        for _ in range(count):
            self._at += 1
            noisy = self.rng.random() < 0.15
            found.append(self.number(1, 3) if noisy else self._pattern[self._at % len(self._pattern)])
        return found

    def sequence(self) -> tuple[int, ...]:
        if self.rng.random() < 0.5:
            return tuple(self.tokens(self.number(1, MAX_TRIGGER_TOKENS)))
        return tuple(self.number(1, 3) for _ in range(self.number(0, 3)))

    def trigger(self) -> Trigger:
        after, until = self.sequence(), self.sequence()
        tokens = self.number(1, 6) if self.rng.random() < 0.3 else NO_END
        return Trigger(after, until, each=bool(after) and self.rng.random() < 0.6, tokens=tokens)

    def request(self, slot: int, num_triggers: int) -> Running:
        """One that begins in the middle, half of the time."""
        cached = self.tokens(self.number(0, 30)) if self.rng.random() < 0.5 else []
        return Running(slot, [self.trigger() for _ in range(num_triggers)], cached)


def run_step(engine: Engine, requests: list[Running], draws: Draws, num_drafts: int) -> None:
    """Some requests take part, in any order. Then some keep only the first of their tokens, and some are preempted."""
    rows: list[tuple[Running | None, list[int]]] = []
    kept: list[tuple[Running, list[int]]] = []
    decoding = draws.rng.random() < 0.3
    for request in requests:
        if draws.rng.random() < 0.2:
            continue
        drafts = draws.number(0, num_drafts)
        if decoding:
            new = draws.tokens(1)
            kept.append((request, new))
        elif draws.rng.random() < 0.5:
            new = draws.tokens(1 + drafts)
            kept.append((request, new[: draws.number(1, 1 + drafts)]))
        else:
            new = draws.tokens(draws.number(0, 14))
            kept.append((request, new))
        rows.append((request, new))
    if draws.rng.random() < 0.5:
        rows.append((None, draws.tokens(1 if decoding else draws.number(0, 4))))
    draws.rng.shuffle(rows)  # type: ignore[arg-type]
    if not rows:
        return
    engine.step(*rows)
    for request, new in kept:
        request.tokens += new
    if draws.rng.random() < 0.2:
        request = requests[draws.number(0, len(requests) - 1)]
        del request.tokens[draws.number(0, len(request.tokens)) :]
        engine.admit(request)


def run_random(kernel: Advance, seed: int, num_drafts: int, num_steps: int) -> None:
    draws = Draws(10 * seed + num_drafts)
    engine = Engine(kernel, num_drafts, torch.int32 if seed % 2 else torch.int64)
    requests = [draws.request(slot, draws.number(1, 3)) for slot in (1, 2, 4)]
    for request in requests:
        engine.admit(request)
    for _ in range(num_steps):
        run_step(engine, requests, draws, num_drafts)
    assert engine.inside > num_steps
    assert engine.outside > num_steps


@pytest.mark.parametrize("num_drafts", [0, 1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_random_requests(interpreted: Process, seed: int, num_drafts: int) -> None:
    run_random(interpreted_by(interpreted), seed, num_drafts, num_steps=14)


@pytest.mark.parametrize("target", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("seed", [0, 1])
def test_random_requests_in_compiled_code(compiled: Process, target: str, seed: int) -> None:
    run_random(compiled_by(compiled, target), seed, num_drafts=3, num_steps=6)


def test_a_chunk_of_several_blocks(interpreted: Process) -> None:
    """The kernel takes 128 rows at a time; and all triggers of a slot are in use."""
    draws = Draws(3)
    engine, request = Engine(interpreted_by(interpreted), 0), draws.request(5, MAX_TRIGGERS)
    request.triggers[:2] = [Trigger((1,), (2,), each=True), Trigger((1, 2), (3, 3))]
    request.tokens = []
    engine.admit(request)
    for count in (130, 1, 257, 3):
        new = draws.tokens(count)
        engine.step((request, new))
        request.tokens += new
    assert engine.inside > 100


@pytest.mark.parametrize("num_drafts", [1, 3])
def test_the_longest_sequences_across_rejected_drafts(interpreted: Process, num_drafts: int) -> None:
    """In each step all drafts are rejected: the history reaches back over them, and over a whole sequence."""
    tokens = [1, 2, 1, 1, 2, 2, 1, 2, 3, 3, 1, 2, 2, 1, 2, 1, 1, 3, 3]
    trigger = Trigger(tuple(tokens[:MAX_TRIGGER_TOKENS]), tuple(tokens[-2 - MAX_TRIGGER_TOKENS : -2]))
    engine, request = Engine(interpreted_by(interpreted), num_drafts), Running(3, [trigger])
    engine.admit(request)
    for token in tokens:
        engine.step((request, [token, *[3] * num_drafts]))
        request.tokens.append(token)
    firsts = [expected_window(trigger, tokens, p) for p in range(len(tokens))]
    assert firsts == [MAX_POSITION] * 8 + [8] * 8 + [MAX_POSITION] * 3


def test_a_slot_without_triggers_is_left_alone(interpreted: Process) -> None:
    """Also the slot of a request that had triggers and has left."""
    engine, request = Engine(interpreted_by(interpreted), 0), Running(1, [Trigger((1,))])
    engine.admit(request)
    engine.step((request, [1, 1]))
    for side in engine.sides:
        side.programs.release(1)
        before = side.tables.history_SHC.clone()
        side.advance(
            *(torch.tensor([0, 2], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)),
            *(torch.tensor([2, 3]), torch.tensor([1, 2], dtype=torch.int32)),
        )
        assert (side.tables.windows_TJ == STALE).all()
        assert torch.equal(side.tables.history_SHC, before)
