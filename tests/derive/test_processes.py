"""Whole processes: peak memory, and a cluster of two nodes of which one dies."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.derivation import varied

from steer_engine.derive.actors import PAIRS_PER_CHUNK, CapturePool


def peak(model: str, num_pairs: int) -> dict[str, float]:
    script = Path(__file__).parents[1] / "helpers" / "peak_memory.py"
    done = subprocess.run(
        [sys.executable, "-P", str(script), model, str(num_pairs)],
        capture_output=True,
        text=True,
        # Ray would end actors if other tests fill the memory of the machine.
        env=os.environ | {"PYTHONPATH": str(script.parents[1]), "RAY_memory_monitor_refresh_ms": "0"},
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


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_node_dies_and_the_run_finishes(tiny_pool: CapturePool, tiny_llama: str) -> None:
    script = Path(__file__).parents[1] / "helpers" / "two_nodes.py"
    done = subprocess.run(
        [sys.executable, "-P", str(script), tiny_llama],
        capture_output=True,
        text=True,
        timeout=800,
        # Ray would end actors if other tests fill the memory of the machine.
        env=os.environ | {"PYTHONPATH": str(script.parents[1]), "RAY_memory_monitor_refresh_ms": "0"},
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    before, after = found["nodes"]
    assert len(set(before)) == 2
    assert found["second"] in before
    assert len(after) == 2
    assert found["second"] not in after
    sha = hashlib.sha256()
    for chunk in tiny_pool.capture_pairs(varied(9 * PAIRS_PER_CHUNK + 5)):
        sha.update(chunk.positive.sum_LD.tobytes() + chunk.negative.sum_LD.tobytes())
    assert found["digest"] == sha.hexdigest()
