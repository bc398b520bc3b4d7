"""A server ends when it is told to, also while it starts, and no process that it started is left."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import psutil
import pytest
import zmq
from helpers.orphans import SECONDS, parent, watching, watching_deaf_to_signals
from helpers.server_process import SMALL, START_SECONDS, Server
from vllm.utils.network_utils import zmq_socket_ctx

from steer_engine.settings import WITH_PARENT_ENV
from steer_engine.vllm import lifetime
from steer_engine.vllm.lifetime import GRACE_SECONDS, end_with_parent, exiting_on_sigterm


def orphan(child: Callable[[Connection], None]) -> psutil.Process:
    """A process of `child` whose parent has just been killed."""
    context = multiprocessing.get_context("spawn")
    reader, writer = context.Pipe(duplex=False)
    started = context.Process(target=parent, args=(child, writer))
    started.start()
    assert reader.poll(SECONDS)
    found = psutil.Process(reader.recv())
    started.kill()
    started.join()
    return found


def seconds_to_end(process: psutil.Process, at_most: float) -> float | None:
    """How long it runs from now; None if it still runs after `at_most` seconds."""
    began = time.monotonic()
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() - began > at_most:
            return None
        time.sleep(0.05)
    return time.monotonic() - began


@pytest.mark.parametrize("child", [watching, watching_deaf_to_signals])
def test_a_process_ends_with_its_parent(child: Callable[[Connection], None], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WITH_PARENT_ENV, "1")
    took = seconds_to_end(orphan(child), GRACE_SECONDS + SECONDS)
    assert took is not None


def test_a_process_that_no_server_started_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(WITH_PARENT_ENV, raising=False)
    left = orphan(watching)
    try:
        assert seconds_to_end(left, 1.0) is None
    finally:
        left.kill()


def test_a_process_without_a_parent_of_ours_watches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(WITH_PARENT_ENV, "1")
    end_with_parent()
    assert lifetime._NAME not in {thread.name for thread in threading.enumerate()}


def vllms_handler(signum: int, frame: object) -> None:
    """As in vLLM's server while it starts."""
    raise KeyboardInterrupt


@pytest.fixture
def sigterm() -> Iterator[None]:
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGTERM, vllms_handler)
    yield
    signal.signal(signal.SIGTERM, before)


def sigterm_while_it_waits() -> None:
    with zmq_socket_ctx("inproc://engine", zmq.ROUTER, bind=True) as socket:
        socket.close()
        signal.raise_signal(signal.SIGTERM)


@pytest.mark.usefixtures("sigterm")
def test_sigterm_is_not_lost_where_vllm_waits_for_its_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM's context manager suppresses its own handler's exception."""
    sigterm_while_it_waits()
    monkeypatch.setenv(WITH_PARENT_ENV, "1")
    with pytest.raises(SystemExit, match="143"), exiting_on_sigterm():
        sigterm_while_it_waits()
    assert signal.getsignal(signal.SIGTERM) is vllms_handler


@pytest.mark.parametrize("handler", [signal.SIG_DFL, vllms_handler])
@pytest.mark.usefixtures("sigterm")
def test_handlers_of_other_programs_stay(monkeypatch: pytest.MonkeyPatch, handler: Any) -> None:
    signal.signal(signal.SIGTERM, handler)
    if callable(handler):
        monkeypatch.delenv(WITH_PARENT_ENV, raising=False)
    else:
        monkeypatch.setenv(WITH_PARENT_ENV, "1")
    with exiting_on_sigterm():
        assert signal.getsignal(signal.SIGTERM) is handler


def handles_sigterm(process: psutil.Process) -> bool:
    """Without a handler, the first process of a container ignores the signal."""
    caught = Path(f"/proc/{process.pid}/status").read_text().partition("SigCgt:")[2].split()[0]
    return bool(int(caught, 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can start the first process of a container")
def test_the_first_process_of_a_container_ends_while_it_imports_vllm(tiny_llama: str, tmp_path: Path) -> None:
    command = ["unshare", "--fork", "--pid", "--kill-child", sys.executable, "-P", "-m", "steer_engine", "serve"]
    with (tmp_path / "log").open("wb") as log:
        outer = subprocess.Popen([*command, tiny_llama, *SMALL], stdout=log, stderr=log)
    try:
        while outer.poll() is None:
            for server in filter(handles_sigterm, psutil.Process(outer.pid).children()):
                server.send_signal(signal.SIGTERM)
            time.sleep(0.2)
    finally:
        outer.kill()
    assert outer.returncode == 128 + signal.SIGTERM
    assert "Traceback" not in (tmp_path / "log").read_text()


def spawned_by(pid: int) -> list[psutil.Process]:
    """The engine processes of a server, also before they have their names."""
    return [
        child
        for child in psutil.Process(pid).children(recursive=True)
        if any("spawn_main" in word or "EngineCore" in word for word in child.cmdline())
    ]


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM while it starts", "SIGKILL"])
def test_a_server_that_ends_leaves_no_process(tiny_llama: str, tmp_path: Path, sent: signal.Signals) -> None:
    """While it starts, the engine core notes SIGTERM and goes on; later it does not notice the end of the server."""
    command = [sys.executable, "-P", "-m", "steer_engine", "serve", tiny_llama, *SMALL]
    server = Server(command, tmp_path / "log", wait=sent is signal.SIGKILL)
    try:
        deadline = time.monotonic() + START_SECONDS
        while not (engines := spawned_by(server.process.pid)):
            assert time.monotonic() < deadline
            time.sleep(0.05)
        server.process.send_signal(sent)
        assert server.process.wait(SECONDS) == (143 if sent is signal.SIGTERM else -sent)
        _, left = psutil.wait_procs(engines, timeout=SECONDS)
        assert left == []
    finally:
        server.client.close()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.process.pid, signal.SIGKILL)
