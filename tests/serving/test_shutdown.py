"""How long a server that stops waits: for who is inside, and for what the last one sends next."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from steer_engine.api.drain import Door
from steer_engine.vllm.shutdown import LINGER_SECONDS, _wait_for_all


@pytest.mark.parametrize("stays", [0.0, 0.6])
def test_the_port_outlives_the_last_answer(stays: float) -> None:
    door = Door()
    engine = SimpleNamespace(output_processor=SimpleNamespace(get_num_unfinished_requests=lambda: 0))
    door.enter()
    leaving = threading.Timer(stays, door.leave)
    began = time.monotonic()
    leaving.start()
    _wait_for_all(engine, door, at_least=0.2, at_most=30)
    assert time.monotonic() - began >= stays + LINGER_SECONDS - 0.05  # it looks 50 times a second
    leaving.join()
    assert door.inside == 0


def test_but_not_for_ever() -> None:
    door = Door()
    engine = SimpleNamespace(output_processor=SimpleNamespace(get_num_unfinished_requests=lambda: 1))
    began = time.monotonic()
    _wait_for_all(engine, door, at_least=0.1, at_most=0.3)
    assert 0.3 <= time.monotonic() - began < 5
