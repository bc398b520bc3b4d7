"""Evaluation harnesses of others, run as they are against our server, on questions of our generator."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


@dataclass(frozen=True, kw_only=True)
class Harness:
    """A program with an environment of its own, since it needs other versions than vLLM.

    script: of its console. variable: names its path where it is not on PATH. packages: what `pip install` needs.
    """

    script: str
    variable: str
    packages: str

    @property
    def path(self) -> str | None:
        return os.environ.get(self.variable) or shutil.which(self.script)

    @property
    def marks(self) -> list[pytest.MarkDecorator]:
        """Of its tests: slow, and skipped where it is not installed."""
        reason = f"needs {self.script} ({self.variable} names it): pip install {self.packages}"
        return [
            pytest.mark.slow,
            pytest.mark.timeout(900),
            pytest.mark.skipif(self.path is None, reason=reason),
        ]

    def run(self, *arguments: str, folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run it in a folder, where it also finds its home."""
        assert self.path is not None
        kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        return subprocess.run(
            [self.path, *arguments], cwd=folder, env=kept | {"HOME": str(folder)} | environment, capture_output=True,
            text=True, timeout=400, check=False,
        )  # fmt: skip


def write_items(path: Path, count: int) -> None:
    """Write `count` questions as JSON lines, by the generator that the examples share."""
    command = [sys.executable, "-P", str(EXAMPLES / "lm_eval" / "items.py"), str(count)]
    path.write_bytes(subprocess.run(command, capture_output=True, check=True, timeout=240).stdout)


def assert_steered(plain: Sequence[Any], steered: Sequence[Any]) -> None:
    """More than half of the answers differ."""
    assert sum(a != b for a, b in zip(plain, steered, strict=True)) > len(plain) // 2
