"""No process of a server outlives the process that started it. Wraps nothing.

vLLM's engine core does not watch the API server, so plain vLLM's engine stays after `kill -9` of the server, with its
memory; only workers watch their engine core, and only once they are ready. Python tells every process that
`multiprocessing` starts when its parent ends: a pipe closes, however the parent ends.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing import connection

from steer_engine.settings import WITH_PARENT_ENV

GRACE_SECONDS = 5.0
"""Between SIGTERM, by which a process releases what it holds, and SIGKILL."""

_NAME = "steer-engine-parent"

logger = logging.getLogger(__name__)


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
