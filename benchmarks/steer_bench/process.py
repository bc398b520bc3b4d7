"""Runs an arm in its own process. While idle, the process blocks on its standard input and uses no CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from steer_bench.load import Load
from steer_bench.settings import Settings
from steer_bench.timing import Timing

BENCHMARKS = Path(__file__).resolve().parents[1]

ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    # Reuse the buffers of a step for the next. By default glibc returns large buffers to the system, and each new one
    # causes page faults. vLLM recommends tcmalloc for this, but no package on PyPI has it.
    "MALLOC_MMAP_THRESHOLD_": str(1 << 25),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 32),
    "MALLOC_TOP_PAD_": str(1 << 26),
}


def environment() -> dict[str, str]:
    """Environment variables of every arm and server: those that vLLM sets for engine processes or recommends.

    torch's OpenMP is loaded first, so that vLLM's kernels and torch's operators share one thread pool.
    """
    torch = find_spec("torch")
    assert torch is not None
    assert torch.origin is not None
    package = Path(torch.origin).parent
    openmp = sorted([*package.glob("lib/libgomp*.so*"), *package.parent.glob("torch.libs/libgomp*.so*")])[:1]
    preloaded = [*map(str, openmp), *os.environ.get("LD_PRELOAD", "").split(":")]
    return ENVIRONMENT | {"LD_PRELOAD": ":".join(filter(None, preloaded))}


class ArmFailed(RuntimeError):
    """An arm failed to load or to run a command. The message has its error or the end of its log."""


class ArmProcess:
    """`with ArmProcess("ours", settings) as arm: arm.run(load)`.

    python: path of the interpreter, for an arm with its own environment.
    """

    def __init__(self, arm: str, settings: Settings, *, python: str = sys.executable) -> None:
        self.name = arm
        self._log = tempfile.NamedTemporaryFile("w+", prefix=f"steer-bench-{arm}-", suffix=".log")  # noqa: SIM115
        more = import_module(f"steer_bench.arms.{arm}").ENVIRONMENT
        self._process = subprocess.Popen(
            [python, "-P", "-m", "steer_bench.child", arm, json.dumps(settings.to_json())],
            env=os.environ | environment() | more | {"PYTHONPATH": str(BENCHMARKS)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
        )
        self._facts: dict[str, Any] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """The arm's description of itself. Waits until the arm is loaded."""
        if self._facts is None:
            self._facts = self._read()
        return self._facts

    def run(self, load: Load, *, check: bool = False) -> Timing:
        return Timing.from_json(self._call({"do": "run", "load": load.to_json(), "check": check}))

    def profile(self, load: Load) -> dict[str, float]:
        """Seconds by kind of operator; see `arms.profiled`."""
        seconds: dict[str, float] = self._call({"do": "profile", "load": load.to_json()})
        return seconds

    def command(self, what: str, **arguments: Any) -> Any:
        """Run a command that only this arm has; see its `command`."""
        return self._call({"do": what, "arguments": arguments})

    def __enter__(self) -> ArmProcess:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _call(self, command: dict[str, Any]) -> Any:
        self.facts  # noqa: B018  (waits until the arm is loaded)
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def _read(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise ArmFailed(f"The process of arm {self.name} has ended. Last lines of its log:\n{self._tail()}")
        reply = json.loads(line)
        if not reply["ok"]:
            raise ArmFailed(f"Arm {self.name}: {reply['reason']}")
        return reply["value"]

    def _tail(self) -> str:
        return "\n".join(Path(self._log.name).read_text(errors="replace").splitlines()[-15:])
