"""How long a shutdown waits: for running requests, and for a client's next request after its last answer."""

from __future__ import annotations

import threading
import time
from types import SimpleNamespace

import pytest

from steer_engine.api.gates import DrainGate
from steer_engine.vllm.shutdown import LINGER_SECONDS, _wait_for_requests


@pytest.mark.parametrize("stays", [0.0, 0.6])
def test_the_port_stays_open_after_the_last_answer(stays: float) -> None:
    gate = DrainGate()
    engine = SimpleNamespace(output_processor=SimpleNamespace(get_num_unfinished_requests=lambda: 0))
    gate.enter()
    leaving = threading.Timer(stays, gate.leave)
    began = time.monotonic()
    leaving.start()
    _wait_for_requests(engine, gate, at_least=0.2, at_most=30)
    assert time.monotonic() - began >= stays + LINGER_SECONDS - 0.05  # it polls 50 times a second
    leaving.join()
    assert gate.running == 0


def test_the_wait_is_bounded() -> None:
    gate = DrainGate()
    engine = SimpleNamespace(output_processor=SimpleNamespace(get_num_unfinished_requests=lambda: 1))
    began = time.monotonic()
    _wait_for_requests(engine, gate, at_least=0.1, at_most=0.3)
    assert 0.3 <= time.monotonic() - began < 5
