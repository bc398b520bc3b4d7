"""Who is inside when the door closes is counted, and nobody comes in after."""

from __future__ import annotations

import threading

import pytest

from steer_engine.api.drain import Door
from steer_engine.errors import CapacityError


def test_who_is_inside_may_leave_and_nobody_comes_in() -> None:
    door = Door()
    door.enter()
    door.refuse_if_closed()
    door.close()
    for knock in (door.enter, door.refuse_if_closed):
        with pytest.raises(CapacityError, match="shutting down") as refused:
            knock()
        assert refused.value.retry_after
    assert (door.inside, door.closed) == (1, True)
    door.leave()
    assert door.inside == 0


def test_none_slips_in_while_it_closes() -> None:
    door, entered, begin = Door(), [0] * 4, threading.Barrier(5)

    def knock(number: int) -> None:
        begin.wait()
        while True:
            try:
                door.enter()
            except CapacityError:
                return
            entered[number] += 1

    threads = [threading.Thread(target=knock, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    begin.wait()
    while not door.inside:
        pass
    door.close()
    seen = door.inside
    for thread in threads:
        thread.join()
    assert seen == door.inside == sum(entered)
