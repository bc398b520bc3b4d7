"""A real server as a child process, with its log kept for the tests."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

START_SECONDS = 240
STOP_SECONDS = 60

# The order of importance is the machine's: one small model, two cores, other tests beside it.
# float32: a processor with AVX2 only multiplies bfloat16 matrices 13 times slower (32 rows of 576, one core).
SMALL = ("--enforce-eager", "--max-model-len", "512", "--max-num-seqs", "8", "--max-num-batched-tokens", "512")
SMALL += ("--dtype", "float32", "--kv-cache-memory-bytes", str(2**28))
"""Several servers live beside each other, so each gets a small KV cache."""


STEERED = 'steer_engine_requests_total{outcome="steered"}'
FINISHED = "vllm:request_success_total"
"""Requests, as /metrics counts them: those that were steered, and those that the engine has finished."""
STEPS = "vllm:iteration_tokens_total_count"
"""Steps of the engine in which a request got a token. Unlike seconds, they do not depend on the machine."""

CAN_PAUSE = {"VLLM_SERVER_DEV_MODE": "1"}
"""Environment of a server that `paused` can pause."""


class Server:
    """Starts `command` on a port (default: a free one). Waits until `ready_path` answers 200, if `wait`."""

    def __init__(
        self,
        command: Sequence[str],
        log: Path,
        *,
        env: Mapping[str, str] | None = None,
        ready_path: str = "/readyz",
        wait: bool = True,
        port: int | None = None,
    ) -> None:
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = log
        # One for all requests: making a client costs more than most of them.
        self.client = httpx.Client(base_url=self.url, timeout=60, limits=httpx.Limits(max_connections=64))
        environment = {"VLLM_NO_USAGE_STATS": "1", **os.environ, **(env or {})}
        if "--kv-cache-memory-bytes" not in command:  # which it would override
            environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        with log.open("wb") as out:
            self.process = subprocess.Popen(
                [*command, "--host", "127.0.0.1", "--port", str(self.port)],
                env=environment, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        if wait:
            self.wait_for(ready_path)

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def post(self, path: str, body: Any, **kwargs: Any) -> httpx.Response:
        """POST with a time limit; `body` may be bytes to send as they are."""
        content = {"content": body} if isinstance(body, bytes) else {"json": body}
        headers = {"content-type": "application/json", **kwargs.pop("headers", {})}
        return self.client.post(path, headers=headers, **content, **kwargs)

    def request(self, method: str, path: str, body: Any) -> httpx.Response:
        return self.client.request(method, path, json=body)

    def get(self, path: str, **kwargs: Any) -> httpx.Response:
        return self.client.get(path, **kwargs)

    def metric(self, beginning: str) -> float:
        """The sum of all series of /metrics whose line begins so: a name, or a name and its first labels."""
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.split()[-1]) for line in lines if line.startswith(beginning))

    def stop(self) -> int:
        """SIGTERM, as an orchestrator does; returns the exit status."""
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            self.kill()
            raise

    def kill(self) -> None:
        """End the server and the engine processes that it started (they share its session)."""
        self.client.close()
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait(STOP_SECONDS)

    def wait_for(self, path: str = "/readyz", seconds: float = START_SECONDS) -> None:
        """Until `path` answers 200; a server that does not come up is ended, and its log is in the error."""
        try:
            self._wait_for(path, seconds)
        except BaseException:
            self.kill()
            raise

    def _wait_for(self, path: str, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                break
            try:
                if self.get(path).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.5)
        raise AssertionError(f"The server is not ready on {path}; the end of its log:\n{self.log[-6000:]}")


def steer_engine_serve(model: str, *flags: str) -> list[str]:
    """The command line that a user types."""
    return [str(Path(sys.executable).with_name("steer-engine")), "serve", model, *SMALL, *flags]


def plain_vllm_serve(model: str, *flags: str) -> list[str]:
    """vLLM's own server, with our package installed but not armed."""
    return [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server", "--model", model, *SMALL, *flags]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def paused(server: Server) -> Iterator[None]:
    """The engine runs no step meanwhile: requests arrive and wait, however late the processes get their time.

    vLLM's processes poll while the engine runs. On two cores, a client beside them may get no time until the engine has
    nothing to do, so that its requests come one after the other.
    """
    answer = server.client.post("/pause", params={"mode": "keep"})
    assert answer.status_code == 200, answer.text
    try:
        yield
    finally:
        assert server.client.post("/resume").status_code == 200


def num_waiting(server: Server) -> int:
    """Steered requests in the engine that do not run."""
    return int(server.get("/v1/steering/stats").json()["engine"]["waiting"])


def wait_until_nothing_is_held(server: Server) -> None:
    """Until no request has a slot, and no row of the bank is kept for one."""
    deadline = time.monotonic() + 30
    while True:
        (worker,) = server.get("/v1/steering/stats").json()["engine"]["workers"]
        if worker["steered_slots"] == worker["bank_rows_pinned"] == 0:
            return
        assert time.monotonic() < deadline, worker
        time.sleep(0.02)
