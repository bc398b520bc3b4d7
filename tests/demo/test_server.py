"""The server process of the demo: readiness, reported exits, and its end after the `with` block."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from steer_engine.demo import server as module
from steer_engine.demo.server import Server
from steer_engine.errors import UnsupportedEngineError

READY_AFTER_S = 0.5

PROGRAM = """#!{python}
import http.server, signal, sys, time
port = int(sys.argv[sys.argv.index("--port") + 1])
if "--broken" in sys.argv:
    sys.exit("no such model")
class Handler(http.server.BaseHTTPRequestHandler):
    began = time.monotonic()
    def do_GET(self):
        self.send_response(200 if time.monotonic() - self.began > {ready_after} else 503)
        self.end_headers()
    def log_message(self, *arguments):
        pass
signal.signal(signal.SIGTERM, signal.SIG_IGN if "--deaf" in sys.argv else lambda *_: sys.exit(0))
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


@pytest.fixture(autouse=True)
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for the console script, beside a stand-in for the interpreter."""
    import sys

    script = tmp_path / "steer-engine"
    script.write_text(PROGRAM.format(python=sys.executable, ready_after=READY_AFTER_S))
    script.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(tmp_path / "python"))


def test_waits_for_readyz_and_stops_cleanly(tmp_path: Path) -> None:
    ticks: list[float] = []
    with Server(["model"], tmp_path / "logs" / "server.log") as server:
        server.wait_until_ready(ticks.append)
        pid = server._process.pid
    assert server.status == 0
    assert ticks == sorted(ticks)
    assert ticks[-1] > 0.1
    assert not Path(f"/proc/{pid}").exists()


def test_a_server_that_ends_is_reported_with_its_last_lines(tmp_path: Path) -> None:
    with Server(["model", "--broken"], tmp_path / "server.log") as server:  # noqa: SIM117
        with pytest.raises(UnsupportedEngineError, match="status 1.*\n.*\nno such model"):
            server.wait_until_ready(lambda _: None)


def test_a_server_that_never_gets_ready_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "READY_TIMEOUT_S", 0.1)
    with Server(["model"], tmp_path / "server.log") as server:  # noqa: SIM117
        with pytest.raises(UnsupportedEngineError, match="not ready after 0.1 s"):
            server.wait_until_ready(lambda _: None)


def test_a_server_that_does_not_stop_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STOP_TIMEOUT_S", 0.2)
    began = time.monotonic()
    with Server(["model", "--deaf"], tmp_path / "server.log") as server:
        server.wait_until_ready(lambda _: None)
        pid = server._process.pid
    assert server.status == -9
    assert time.monotonic() - began < 20
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
