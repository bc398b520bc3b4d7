"""The drain gate counts running requests, and refuses new ones once it is closed."""

from __future__ import annotations

import threading

import pytest

from steer_engine.api.gates import DrainGate
from steer_engine.errors import CapacityError


def test_a_closed_gate_lets_running_requests_finish_and_refuses_new_ones() -> None:
    gate = DrainGate()
    gate.enter()
    gate.check_open()
    gate.close()
    for refused_call in (gate.enter, gate.check_open):
        with pytest.raises(CapacityError, match="shutting down") as refused:
            refused_call()
        assert refused.value.retry_after
    assert (gate.running, gate.closed) == (1, True)
    gate.leave()
    assert gate.running == 0


def test_no_request_is_counted_after_the_gate_is_closed() -> None:
    gate, entered, begin = DrainGate(), [0] * 4, threading.Barrier(5)

    def enter_until_refused(number: int) -> None:
        begin.wait()
        while True:
            try:
                gate.enter()
            except CapacityError:
                return
            entered[number] += 1

    threads = [threading.Thread(target=enter_until_refused, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    begin.wait()
    while not gate.running:
        pass
    gate.close()
    seen = gate.running
    for thread in threads:
        thread.join()
    assert seen == gate.running == sum(entered)
