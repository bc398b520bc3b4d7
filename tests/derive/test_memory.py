"""What a derivation takes does not grow with the data: the kernel's own high-water marks, of processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


def peak(model: str, num_pairs: int) -> dict[str, float]:
    script = Path(__file__).parents[1] / "helpers" / "peak_memory.py"
    done = subprocess.run(
        [sys.executable, "-P", str(script), model, str(num_pairs)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(script.parents[1])},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.slow
def test_twenty_times_the_pairs_take_no_more_memory(tiny_llama: str) -> None:
    few, many = peak(tiny_llama, 1000), peak(tiny_llama, 20_000)
    for process in ("driver", "actors"):
        assert few[process] > 50
        assert many[process] <= 1.1 * few[process], f"{process}: {few} and {many}"
