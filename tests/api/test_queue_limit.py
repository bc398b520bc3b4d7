"""The limit on waiting steered requests: the engine's number, plus the requests admitted since."""

from __future__ import annotations

import asyncio

import pytest

from steer_engine.api.gates import REFRESH_SECONDS, QueueLimit
from steer_engine.errors import CapacityError


class Engine:
    def __init__(self) -> None:
        self.waiting, self.num_calls, self.now = 0, 0, 100.0

    async def num_waiting(self) -> int:
        self.num_calls += 1
        await asyncio.sleep(0)
        return self.waiting

    def clock(self) -> float:
        return self.now


async def admitted(queue: QueueLimit, times: int) -> int:
    results = await asyncio.gather(*(queue.enter() for _ in range(times)), return_exceptions=True)
    assert all(result is None or isinstance(result, CapacityError) for result in results)
    return results.count(None)


async def test_a_burst_is_cut_at_the_limit_with_one_call_to_the_engine() -> None:
    engine = Engine()
    queue = QueueLimit(engine.num_waiting, 3, engine.clock)
    assert await admitted(queue, 10) == 3
    assert engine.num_calls == 1


async def test_the_engine_s_own_number_counts_after_a_refresh() -> None:
    engine = Engine()
    queue = QueueLimit(engine.num_waiting, 3, engine.clock)
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
    assert engine.num_calls == 4
