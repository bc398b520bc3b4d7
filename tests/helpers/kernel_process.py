"""Calls into a worker process that runs or compiles Triton kernels."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import steer_kernels
import torch
from steer_kernels.tables import Tables

from helpers import kernel_worker as worker


class Process:
    """A worker, and calls into it that look like calls of the launchers."""

    def __init__(self, **environment: str) -> None:
        inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
        packages = str(Path(steer_kernels.__file__).parent.parent)
        path = os.pathsep.join([packages, *filter(None, [inherited.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            [sys.executable, "-P", worker.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **environment},
        )

    def call(self, function: str, *args: Any, **kwargs: Any) -> Any:
        """Calls steer_kernels.<function>; tensors among the arguments get what the call wrote into them."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        worker.send(self._process.stdin, (f"steer_kernels.{function}", args, kwargs))
        status, answer = worker.receive(self._process.stdout)
        assert status == "ok", answer
        result, written = answer
        for mine, theirs in zip(args, written, strict=True):
            copy_back(mine, theirs)
        return result

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


def copy_back(mine: Any, theirs: Any) -> None:
    if isinstance(mine, torch.Tensor):
        mine.copy_(theirs)
    elif isinstance(mine, Tables):
        for name in Tables.__dataclass_fields__:
            copy_back(getattr(mine, name), getattr(theirs, name))
