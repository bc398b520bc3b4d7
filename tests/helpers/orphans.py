"""Processes for tests of what happens to a child whose parent is killed. A new process can import this module."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.connection import Connection

from steer_engine.vllm.lifetime import end_with_parent

SECONDS = 30.0
"""More than two imports take on a busy machine."""


def parent(child: Callable[[Connection], None], writer: Connection) -> None:
    """Start `child`, which says its process id, and wait to be killed."""
    multiprocessing.get_context("spawn").Process(target=child, args=(writer,)).start()
    time.sleep(10 * SECONDS)


def watching(writer: Connection) -> None:
    end_with_parent()
    end_with_parent()
    writer.send(os.getpid())
    time.sleep(10 * SECONDS)


def watching_deaf_to_signals(writer: Connection) -> None:
    """As an engine core that is starting: vLLM notes SIGTERM and goes on."""
    signal.signal(signal.SIGTERM, lambda *_: None)
    end_with_parent()
    writer.send(os.getpid())
    deadline = time.monotonic() + 10 * SECONDS
    while time.monotonic() < deadline:
        time.sleep(0.1)
