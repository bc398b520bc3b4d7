"""Who may start where the bank is small: whoever fits, and nobody past a request that has waited for long."""

from __future__ import annotations

import random
from dataclasses import dataclass

from steer_engine.engine.admission import PATIENCE_SECONDS, BankQueue
from steer_engine.program import Row, RowKey


@dataclass(frozen=True)
class Ask:
    number: int
    vectors: tuple[str, ...] = ()
    blocks: int = 3
    age: float = 0.0

    @property
    def rows(self) -> frozenset[Row]:
        keys = [RowKey(terms=((vector, 1.0),)) for vector in self.vectors]
        return frozenset((key, block) for key in keys for block in range(self.blocks))


def queue(num_rows: int) -> BankQueue[Ask]:
    return BankQueue(num_rows, lambda ask: ask.rows, lambda ask: ask.age)


def planned(bank: BankQueue[Ask], running: list[Ask], waiting: list[Ask]) -> list[Ask]:
    """Plan one step: who starts."""
    bank.begin_step()
    started = []
    for ask in waiting:
        if bank.may_start(ask, running):
            running.append(ask)
            started.append(ask)
    return started


def test_who_does_not_fit_waits_until_rows_are_free() -> None:
    bank, running = queue(6), []
    a, b, c = (Ask(i, (name,)) for i, name in enumerate("abc"))
    assert planned(bank, running, [a, b, c]) == [a, b]
    assert planned(bank, running, [c]) == []
    running.remove(a)
    assert planned(bank, running, [c]) == [c]


def test_equal_rows_are_shared_and_unsteered_requests_need_none() -> None:
    bank, running = queue(3), []
    asks = [Ask(0, ("a",)), Ask(1, ("b",)), Ask(2, ("a",)), Ask(3)]
    assert planned(bank, running, asks) == [asks[0], asks[2], asks[3]]
    running.remove(asks[0])
    assert planned(bank, running, [asks[1]]) == []
    running.remove(asks[2])
    assert planned(bank, running, [asks[1]]) == [asks[1]]


def test_nobody_overtakes_who_has_waited_for_long() -> None:
    hot, cold = Ask(0, ("hot",)), Ask(1, ("cold",), age=PATIENCE_SECONDS)
    more = [Ask(2, ("hot",)), Ask(3)]
    bank, running = queue(3), [hot]
    assert planned(bank, running, [cold, *more]) == [more[1]]
    running.remove(hot)
    assert planned(bank, running, [cold, more[0]]) == [cold]
    young, bank, running = Ask(4, ("cold",)), queue(3), [hot]
    assert planned(bank, running, [young, *more]) == more


def test_preempted_requests_give_up_their_rows() -> None:
    bank, running = queue(3), []
    first, second = Ask(0, ("a",)), Ask(1, ("b",))
    assert planned(bank, running, [first]) == [first]
    running.remove(first)
    assert planned(bank, running, [second, first]) == [second]


def test_the_rows_of_all_that_run_always_fit_and_all_get_their_turn() -> None:
    rng = random.Random(0)
    for num_rows in (4, 6, 9):
        bank, running, done = queue(num_rows), [], 0
        waiting = [Ask(i, tuple(rng.sample("abcde", rng.randrange(3))), blocks=rng.randrange(1, 3)) for i in range(200)]
        for _ in range(1000):
            started = planned(bank, running, waiting[:20])
            waiting = [ask for ask in waiting if ask not in started]
            assert len({row for ask in running for row in ask.rows}) <= num_rows
            for ask in [ask for ask in running if rng.random() < 0.4]:
                running.remove(ask)
                if rng.random() < 0.1:
                    waiting.insert(0, ask)  # preempted
                else:
                    done += 1
            if not waiting and not running:
                break
        assert done == 200
