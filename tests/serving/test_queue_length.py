"""Too many waiting requests: the next one is sent away, by what the engine says and by what came in since."""

from __future__ import annotations

import asyncio

import pytest

from steer_engine.api.background import REFRESH_SECONDS, QueueLength
from steer_engine.errors import CapacityError


class Engine:
    def __init__(self) -> None:
        self.waiting, self.asked, self.now = 0, 0, 100.0

    async def ask(self) -> int:
        self.asked += 1
        await asyncio.sleep(0)
        return self.waiting

    def clock(self) -> float:
        return self.now


async def admitted(queue: QueueLength, times: int) -> int:
    results = await asyncio.gather(*(queue.enter() for _ in range(times)), return_exceptions=True)
    assert all(result is None or isinstance(result, CapacityError) for result in results)
    return results.count(None)


async def test_a_burst_is_cut_at_the_limit_and_the_engine_is_asked_once() -> None:
    engine = Engine()
    queue = QueueLength(engine.ask, 3, engine.clock)
    assert await admitted(queue, 10) == 3
    assert engine.asked == 1


async def test_the_engine_s_own_number_counts_when_it_is_asked_again() -> None:
    engine = Engine()
    queue = QueueLength(engine.ask, 3, engine.clock)
    await admitted(queue, 3)
    engine.now += REFRESH_SECONDS
    engine.waiting = 2
    assert await admitted(queue, 3) == 1
    engine.now += REFRESH_SECONDS
    engine.waiting = 3
    with pytest.raises(CapacityError, match="max_bank_queue") as caught:
        await queue.enter()
    assert caught.value.retry_after >= 1
    engine.now += REFRESH_SECONDS
    engine.waiting = 0
    assert await admitted(queue, 9) == 3
    assert engine.asked == 4
