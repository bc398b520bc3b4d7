"""A `steer-engine serve` child process: started on a free port, watched until ready, stopped cleanly."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from steer_engine.errors import UnsupportedEngineError

READY_TIMEOUT_S = 300
STOP_TIMEOUT_S = 45
"""The server finishes what is in flight for up to 30 s after SIGTERM."""

LOG_LINES_SHOWN = 15


class Server:
    """Runs while its `with` block runs; `status` is its exit status afterwards."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log = log
        self.status: int | None = None
        program = str(Path(sys.executable).with_name("steer-engine"))
        self._command = [program, "serve", *arguments, "--host", "127.0.0.1", "--port", str(port)]

    def __enter__(self) -> Server:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C reaches us only; we pass it on in order
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ask it to end and wait; after the time-out it is killed."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self.status = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # it leads its own session: this takes its children along
            self.status = self._process.wait()

    def wait_until_ready(self, tick: Callable[[float], None]) -> None:
        """Return when `/readyz` says 200; `tick(seconds waited)` is called about five times a second.

        Raises UnsupportedEngineError with the end of the log if the server ends, or takes too long.
        """
        began = time.monotonic()
        while (passed := time.monotonic() - began) < READY_TIMEOUT_S:
            if self._process.poll() is not None:
                raise UnsupportedEngineError(
                    f"The server ended with status {self._process.returncode}.{self._last_lines()}"
                )
            if _answers(f"{self.url}/readyz"):
                return
            tick(passed)
            time.sleep(0.2)
        raise UnsupportedEngineError(f"The server was not ready after {READY_TIMEOUT_S} s.{self._last_lines()}")

    def _last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        return "\n".join(["", f"Its log, {self.log}, ends with:", *lines])


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
