"""Readiness comes from the engine, by one handshake at a time that is never cancelled."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from steer_engine.api.background import Readiness
from steer_engine.errors import CapacityError, UnsupportedEngineError


class Engine:
    def __init__(self) -> None:
        self.calls = 0
        self.finished = 0
        self.wait: asyncio.Event | None = None
        self.error: Exception | None = None

    async def handshake(self) -> dict[str, Any]:
        self.calls += 1
        if self.wait is not None:
            await self.wait.wait()
        self.finished += 1
        if self.error is not None:
            raise self.error
        return {"workers": 1}


async def test_the_status_is_the_engine_s() -> None:
    engine = Engine()
    assert await Readiness(engine.handshake).check() == {"workers": 1}


async def test_each_probe_is_a_handshake_and_concurrent_probes_share_one() -> None:
    engine = Engine()
    readiness = Readiness(engine.handshake)
    await readiness.check()
    await readiness.check()
    assert engine.calls == 2
    await asyncio.gather(*(readiness.check() for _ in range(20)))
    assert engine.calls == 3


async def test_a_timeout_leaves_the_call_running() -> None:
    engine = Engine()
    engine.wait = asyncio.Event()
    readiness = Readiness(engine.handshake, timeout=0.01)
    for _ in range(2):
        with pytest.raises(CapacityError, match=r"0\.01 s"):
            await readiness.check()
    assert (engine.calls, engine.finished) == (1, 0)
    engine.wait.set()
    assert await readiness.check() == {"workers": 1}
    assert (engine.calls, engine.finished) == (1, 1)


@pytest.mark.parametrize(
    ("raised", "expected"),
    [(UnsupportedEngineError("not armed"), UnsupportedEngineError), (RuntimeError("dead"), CapacityError)],
)
async def test_any_failure_is_a_reason(raised: Exception, expected: type[Exception]) -> None:
    engine = Engine()
    engine.error = raised
    with pytest.raises(expected):
        await Readiness(engine.handshake).check()
    engine.error = None
    assert await Readiness(engine.handshake).check() == {"workers": 1}


async def test_a_failure_after_the_timeout_is_not_an_unhandled_error() -> None:
    """asyncio would log a traceback for it when the task is collected."""
    unhandled: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: unhandled.append(context))
    engine = Engine()
    engine.wait, engine.error = asyncio.Event(), CapacityError("The engine did not answer.")
    readiness = Readiness(engine.handshake, timeout=0.01)
    with pytest.raises(CapacityError, match=r"0\.01 s"):
        await readiness.check()
    engine.wait.set()
    while not engine.finished:
        await asyncio.sleep(0)
    await asyncio.sleep(0.01)
    engine.error = None
    assert await readiness.check() == {"workers": 1}  # replaces the failed task
    gc.collect()
    assert unhandled == []
