"""Actors on a real Ray that do trivial work: order, back-pressure, errors, and restarts."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from steer_engine.derive.actors import (
    CALLS_IN_FLIGHT,
    LOCAL_STARTS,
    MAX_ACTOR_RESTARTS,
    Workers,
    _require_listening,
    _start_local_ray,
    ray_session,
)
from steer_engine.errors import DerivationError


class TrivialActor:
    """Records in a folder which process answered which call."""

    def square(self, folder: str, number: int) -> int:
        Path(folder, f"{number}-{os.getpid()}").touch()
        time.sleep(0.02 * (number % 3))
        return number * number

    def die_once(self, folder: str, number: int) -> int:
        """Ends its process, as `kill -9` does, at the first call with 5."""
        mark = Path(folder, "died")
        if number == 5 and not mark.exists():
            mark.touch()
            os._exit(137)
        return self.square(folder, number)

    def die(self) -> None:
        os._exit(137)

    def refuse(self, number: int) -> None:
        raise DerivationError(f"pairs.jsonl:{number}: no.")

    def crash(self) -> None:
        raise ZeroDivisionError("by hand")

    def sleep(self) -> None:
        time.sleep(2)


@pytest.fixture(scope="module")
def workers() -> Iterator[Workers]:
    with ray_session(None, num_cpus=2) as ray:
        # The actors' processes must find this file's module.
        env = {"PYTHONPATH": str(Path(__file__).parents[1])}
        workers = Workers(ray, TrivialActor, (), count=2, resources={"num_cpus": 0}, env=env)
        yield workers
        workers.stop()


def processes(folder: Path) -> set[str]:
    return {file.name.partition("-")[2] for file in folder.glob("*-*")}


def test_answers_of_both_actors_come_in_the_order_of_the_calls(workers: Workers, tmp_path: Path) -> None:
    answers = workers.ordered("square", [(str(tmp_path), i) for i in range(40)])
    assert list(answers) == [i * i for i in range(40)]
    assert len(processes(tmp_path)) == 2
    assert list(workers.ordered("square", [])) == []


def test_calls_run_at_most_two_windows_ahead(workers: Workers, tmp_path: Path) -> None:
    answers = workers.ordered("square", [(str(tmp_path), i) for i in range(100)])
    for _ in range(3):
        next(answers)
    time.sleep(1.0)
    assert 3 <= len(list(tmp_path.iterdir())) <= 3 + 2 * CALLS_IN_FLIGHT * len(workers)


def test_our_errors_are_raised_unchanged_and_others_as_a_sentence(workers: Workers) -> None:
    with pytest.raises(DerivationError, match=r"^pairs\.jsonl:3: no\.$"):
        list(workers.ordered("refuse", [(3,)]))
    with pytest.raises(DerivationError, match="^An actor failed: ZeroDivisionError: by hand$"):
        list(workers.ordered("crash", [()]))
    with pytest.raises(DerivationError, match=r"No actor was ready within 1 s\. Does the cluster have room for 2\?"):
        workers.everywhere("sleep", timeout=1.0)


def test_an_actor_that_dies_is_restarted_and_its_calls_are_repeated(workers: Workers, tmp_path: Path) -> None:
    answers = workers.ordered("die_once", [(str(tmp_path), i) for i in range(20)])
    assert list(answers) == [i * i for i in range(20)]
    assert (tmp_path / "died").exists()
    assert len(processes(tmp_path)) == 3


@pytest.mark.slow  # the last of the file: it uses the actors up
def test_an_actor_that_keeps_dying_is_an_error(workers: Workers) -> None:
    with pytest.raises(DerivationError, match=rf"died, and again after {MAX_ACTOR_RESTARTS} restarts"):
        list(workers.ordered("die", [()]))


def test_an_unreachable_address_is_refused_at_once() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # taken, but not listened at
        port = bound.getsockname()[1]
        for address in (f"127.0.0.1:{port}", f"ray://127.0.0.1:{port}", "127.0.0.1:99999"):
            with pytest.raises(DerivationError, match=f"There is no Ray cluster at '{address}'"):
                _require_listening(address)
    _require_listening("auto")


@pytest.mark.parametrize("failures", [0, LOCAL_STARTS - 1, LOCAL_STARTS])
def test_a_local_ray_that_was_too_slow_is_started_again(failures: int) -> None:
    """A stand-in for Ray, because its limit of 30 s cannot be reached on purpose."""
    calls: list[str] = []

    def init(**settings: object) -> None:
        calls.append("init")
        if calls.count("init") <= failures:
            raise Exception("The current node timed out during startup.")

    ray = SimpleNamespace(init=init, shutdown=lambda: calls.append("shutdown"))
    if failures == LOCAL_STARTS:
        with pytest.raises(
            DerivationError, match=r"did not start on this machine in 3 attempts: The current node timed out"
        ):
            _start_local_ray(ray)
    else:
        _start_local_ray(ray)
    assert calls == ["init", "shutdown"] * failures + ["init"] * (failures < LOCAL_STARTS)
