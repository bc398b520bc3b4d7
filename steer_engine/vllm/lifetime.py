"""A server ends on SIGTERM while it starts, and no process outlives the server that started it. Wraps nothing.

vLLM's engine core does not watch the API server, so plain vLLM's engine stays after `kill -9` of the server, with its
memory; only workers watch their engine core, and only once they are ready. Python tells every process that
`multiprocessing` starts when its parent ends: a pipe closes, however the parent ends.

On SIGTERM while its engine starts, vLLM 0.32's server raises KeyboardInterrupt. `zmq_socket_ctx`, around the wait for
the engine, suppresses that: the server waits on, for ten minutes (VLLM_ENGINE_READY_TIMEOUT_S).
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import connection

from steer_engine.settings import WITH_PARENT_ENV

GRACE_SECONDS = 5.0
"""Between SIGTERM, by which a process releases what it holds, and SIGKILL."""

_NAME = "steer-engine-parent"

logger = logging.getLogger(__name__)


def exit_on_signal(signum: int, frame: object) -> None:
    """A signal handler: ends the process with the status that a shell gives to the signal."""
    raise SystemExit(128 + signum)


@contextmanager
def exiting_on_sigterm() -> Iterator[None]:
    """While a server's engine starts in the body, SIGTERM ends the server. Then vLLM's handler is back."""
    handler = signal.getsignal(signal.SIGTERM)
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or not callable(handler) or os.environ.get(WITH_PARENT_ENV) != "1":
        yield
        return
    signal.signal(signal.SIGTERM, exit_on_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def end_with_parent() -> None:
    """End this process when its parent ends, if a server started it. Calling it again changes nothing."""
    parent = multiprocessing.parent_process()
    if parent is None or os.environ.get(WITH_PARENT_ENV) != "1":
        return
    if any(thread.name == _NAME for thread in threading.enumerate()):
        return
    threading.Thread(target=_wait, args=(parent.sentinel,), name=_NAME, daemon=True).start()


def _wait(parent: int) -> None:
    connection.wait([parent])
    logger.error("The process that started this one has ended, so this one ends, too.")
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(GRACE_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
