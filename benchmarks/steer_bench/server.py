"""A server under test, plain vLLM or Steer Engine, on a free loopback port."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steer_bench.process import ArmFailed, environment
from steer_bench.settings import Settings

START_SECONDS = 600
STOP_SECONDS = 60

COMMANDS = {
    "stock": ("-m", "vllm.entrypoints.openai.api_server", "--model"),
    "ours": ("-m", "steer_engine", "serve"),
}
PLUGINS = {"stock": {"VLLM_PLUGINS": ""}, "ours": {}}


def flags_of(settings: Settings, port: int, vectors: Path | None = None) -> list[str]:
    """The flags of a server, after its model."""
    flags = [
        "--host", "127.0.0.1", "--port", str(port), "--served-model-name", "bench", "--dtype", settings.dtype,
        "--max-num-seqs", str(settings.max_num_seqs), "--max-model-len", str(settings.max_model_len),
        "--gpu-memory-utilization", str(settings.memory), "--block-size", "32", "--seed", "0",
    ]  # fmt: skip
    flags += ["--enforce-eager"] if settings.eager else []
    flags += ["--steering-vectors", str(vectors)] if vectors is not None else []
    return flags


def parse_flags(settings: Settings) -> None:
    """Parse the flags of our server as it would, and start nothing. Exits, or raises SteerError, if one is wrong."""
    from steer_engine.vllm.launch import parse_serve_flags

    with tempfile.TemporaryDirectory() as vectors:
        parse_serve_flags([settings.model, *flags_of(settings.compiled(), 8000, Path(vectors))])


class Server:
    """`with Server("ours", settings, vectors=folder) as server: server.url`."""

    def __init__(self, kind: str, settings: Settings, *, vectors: Path | None = None) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self._kind = kind
        flags = flags_of(settings, port, vectors)
        variables = os.environ | environment() | PLUGINS[kind]
        del variables["VLLM_ENABLE_V1_MULTIPROCESSING"]
        self._log = tempfile.NamedTemporaryFile("w+", prefix=f"steer-bench-server-{kind}-", suffix=".log")  # noqa: SIM115
        self._process = subprocess.Popen(
            [sys.executable, "-P", *COMMANDS[kind], settings.model, *flags],
            env=variables,
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def wait(self) -> None:
        """Wait until the server is ready. Raises ArmFailed with the end of its log."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.5)
        tail = "\n".join(Path(self._log.name).read_text(errors="replace").splitlines()[-15:])
        raise ArmFailed(f"The {self._kind} server did not start. Last lines of its log:\n{tail}")

    def complete(self, fields: Mapping[str, Any]) -> dict[str, Any]:
        """The response to one completion request."""
        body = json.dumps({"model": "bench", "prompt": "My day was", "max_tokens": 8, "temperature": 0, **fields})
        headers = {"content-type": "application/json"}
        request = urllib.request.Request(f"{self.url}/v1/completions", body.encode(), headers)
        with urllib.request.urlopen(request, timeout=120) as response:
            parsed: dict[str, Any] = json.load(response)
            return parsed

    def get(self, path: str) -> dict[str, Any]:
        """The JSON response of a GET request."""
        with urllib.request.urlopen(f"{self.url}{path}", timeout=60) as response:
            parsed: dict[str, Any] = json.load(response)
            return parsed

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._log.close()
