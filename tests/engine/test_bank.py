"""The bank, against a model of it: whatever comes and goes, a row in use holds what it was pinned for."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from steer_engine.engine.bank import Bank
from steer_engine.program import Row, RowKey

NUM_ROWS = 6
HIDDEN_SIZE = 3


def row(name: str, block: int = 0, *, unit: bool = False, weight: float = 1.0) -> Row:
    return RowKey(terms=((name, weight),), unit=unit), block


def content(key: RowKey, block: int) -> np.ndarray:
    """Different for every row."""
    number = sum((ord(name[0]) - 96) * weight for name, weight in key.terms)
    return np.array([number, block, key.unit], dtype=np.float32)


class Counting:
    """`content`, which records its arguments."""

    def __init__(self) -> None:
        self.made: list[Row] = []

    def __call__(self, key: RowKey, block: int) -> np.ndarray:
        self.made.append((key, block))
        return content(key, block)


def new_bank(num_rows: int = NUM_ROWS, dtype: torch.dtype = torch.float32) -> tuple[Bank, torch.Tensor, Counting]:
    bank_RD, make = torch.full((num_rows, HIDDEN_SIZE), -1.0, dtype=dtype), Counting()
    return Bank(bank_RD, make), bank_RD, make


def assert_holds(bank_RD: torch.Tensor, numbers: list[int], rows: list[Row]) -> None:
    for number, (key, block) in zip(numbers, rows, strict=True):
        assert bank_RD[number].tolist() == content(key, block).tolist()


def test_rows_are_shared_by_content_and_written_once() -> None:
    bank, bank_RD, make = new_bank()
    rows = [row("a"), row("a", 1), row("a", unit=True), row("b"), row("a", weight=0.5)]
    first, second = bank.pin(rows), bank.pin(rows[::-1])
    assert second == first[::-1]
    assert len(set(first)) == len(rows)
    assert make.made == rows
    assert bank.num_pinned == len(rows)
    assert_holds(bank_RD, first, rows)


def test_an_idle_row_is_found_again() -> None:
    bank, bank_RD, make = new_bank()
    rows = [row("a"), row("b")]
    first = bank.pin(rows)
    bank.unpin(rows)
    assert bank.num_pinned == 0
    assert bank.pin(rows) == first
    assert make.made == rows
    assert_holds(bank_RD, first, rows)


def test_the_row_that_was_idle_longest_makes_way() -> None:
    bank, _, make = new_bank(2)
    for name in "ab":
        bank.pin([row(name)])
    bank.unpin([row("b")])
    bank.unpin([row("a")])
    bank.pin([row("c")])
    bank.pin([row("a")])
    assert make.made == [row("a"), row("b"), row("c")]


def test_a_row_pinned_twice_in_one_call_has_two_users() -> None:
    bank, bank_RD, _ = new_bank(1)
    numbers = bank.pin([row("a"), row("a")])
    assert numbers == [0, 0]
    bank.unpin([row("a")])
    assert not bank.can_pin([row("b")])
    assert bank.num_pinned == 1
    bank.unpin([row("a")])
    assert bank.can_pin([row("b"), row("b")])
    assert_holds(bank_RD, bank.pin([row("b"), row("b")]), [row("b"), row("b")])


@pytest.mark.parametrize("turned", [False, True])
def test_a_needed_idle_row_does_not_make_way_for_its_sibling(turned: bool) -> None:
    """One row is idle and needed, one is idle and not: the new row must take the place of the latter."""
    bank, bank_RD, make = new_bank(2)
    old = [row("a"), row("b")]
    bank.pin(old)
    bank.unpin(old)  # a is the one that has been idle longest
    wanted = [row("a"), row("c")] if turned else [row("c"), row("a")]
    assert bank.can_pin(wanted)
    numbers = bank.pin(wanted)
    assert len(set(numbers)) == 2
    assert_holds(bank_RD, numbers, wanted)
    assert make.made == [*old, row("c")]


def test_idle_rows_that_are_needed_are_no_room() -> None:
    bank, _, _ = new_bank(2)
    bank.pin([row("a")])
    bank.unpin([row("a")])
    assert bank.can_pin([row("a"), row("b")])
    assert not bank.can_pin([row("a"), row("b"), row("c")])
    assert bank.can_pin([row("b"), row("c")])
    with pytest.raises(AssertionError, match="admission"):
        bank.pin([row("a"), row("b"), row("c")])


def test_forgetting_takes_idle_rows_only() -> None:
    bank, bank_RD, make = new_bank(3)
    merged = (RowKey(terms=(("a", 0.5), ("b", 2.0))), 0)
    numbers = bank.pin([row("a"), merged, row("b")])
    bank.unpin([merged, row("b")])
    bank.forget("a")
    assert_holds(bank_RD, numbers[:1], [row("a")])
    assert bank.can_pin([row("c"), row("d")])
    bank.pin([row("b")])
    assert make.made == [row("a"), merged, row("b")]
    bank.pin([merged])
    assert make.made[3:] == [merged]
    assert not bank.can_pin([row("c")])


def test_rows_are_written_in_the_dtype_of_the_bank() -> None:
    bank_RD = torch.zeros(1, 2, dtype=torch.bfloat16)
    Bank(bank_RD, lambda key, block: np.array([1 / 3, 1e30], dtype=np.float32)).pin([row("a")])
    assert torch.equal(bank_RD[0], torch.tensor([1 / 3, 1e30]).bfloat16())


def test_a_row_that_cannot_be_made_changes_nothing() -> None:
    """A later request for the same row must not find it pinned, empty, or full of something else."""

    def make(key: RowKey, block: int) -> np.ndarray:
        if key.terms[0][0] == "x":
            raise KeyError("x")
        return content(key, block)

    bank_RD = torch.full((2, HIDDEN_SIZE), -1.0)
    bank = Bank(bank_RD, make)
    bank.pin([row("a")])
    bank.unpin([row("a")])
    for rows in ([row("x")], [row("b"), row("x")], [row("a"), row("x")]):
        for _ in range(2):
            with pytest.raises(KeyError):
                bank.pin(rows)
        assert bank.num_pinned == 0
    assert bank.can_pin([row("b"), row("c")])
    assert_holds(bank_RD, bank.pin([row("a"), row("b")]), [row("a"), row("b")])


names, blocks = st.sampled_from("abcde"), st.integers(0, 1)
single_rows = st.builds(row, names, blocks, unit=st.booleans())
merged_rows = st.builds(
    lambda pair, block: (RowKey(terms=tuple((name, 0.5 * (i + 1)) for i, name in enumerate(sorted(pair)))), block),
    st.sets(names, min_size=2, max_size=2),
    blocks,
)
requests = st.lists(single_rows | merged_rows, max_size=4)


class BankMachine(RuleBasedStateMachine):
    """Requests that come and go, in any order, over more rows than there is room for."""

    def __init__(self) -> None:
        super().__init__()
        self.bank, self.bank_RD, _ = new_bank()
        self.running: list[tuple[list[Row], list[int]]] = []

    @property
    def users(self) -> Counter[Row]:
        return Counter(row for rows, _ in self.running for row in rows)

    @rule(rows=requests)
    def admit(self, rows: list[Row]) -> None:
        fits = len(set(self.users) | set(rows)) <= NUM_ROWS
        assert self.bank.can_pin(rows) == fits
        if fits:
            self.running.append((rows, self.bank.pin(rows)))
        else:
            with pytest.raises(AssertionError):
                self.bank.pin(rows)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, 99), turned=st.booleans())
    def release(self, which: int, turned: bool) -> None:
        rows, _ = self.running.pop(which % len(self.running))
        self.bank.unpin(rows[::-1] if turned else rows)

    @rule(name=names)
    def forget(self, name: str) -> None:
        self.bank.forget(name)

    @invariant()
    def rows_in_use_are_right(self) -> None:
        for rows, numbers in self.running:
            assert_holds(self.bank_RD, numbers, rows)
        assert self.bank.num_pinned == len(self.users)

    @invariant()
    def no_place_is_lost(self) -> None:
        free = NUM_ROWS - len(self.users)
        others = [row(name, 9) for name in "abcdefg"]
        assert self.bank.can_pin(others[:free])
        assert not self.bank.can_pin(others[: free + 1])


BankMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=15, deadline=None)
TestBankMachine = BankMachine.TestCase


def test_requests_that_keep_to_their_share_always_find_room() -> None:
    """max_requests x sites x rows: full by construction never happens, whatever is left over from before."""
    max_requests, num_sites, rows_each = 3, 2, 2
    bank, bank_RD, _ = new_bank(max_requests * num_sites * rows_each)
    rng = np.random.default_rng(0)
    running: list[tuple[list[Row], list[int]]] = []
    for _ in range(400):
        if len(running) == max_requests:
            rows, _ = running.pop(int(rng.integers(max_requests)))
            bank.unpin(rows)
        rows = [
            row(name, site) for site in range(num_sites) for name in rng.choice(list("abcdefghijk"), rows_each).tolist()
        ]
        running.append((rows, bank.pin(rows)))
        for held, numbers in running:
            assert_holds(bank_RD, numbers, held)
