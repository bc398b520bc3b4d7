"""An armed engine's process keeps what its steps free."""

from __future__ import annotations

import os
import platform
import resource

import pytest
import torch

from steer_engine import LLM


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or "LD_PRELOAD" in os.environ or "MALLOC_TRIM_THRESHOLD_" in os.environ,
    reason="Of glibc, as it is.",
)
def test_freed_memory_stays(tiny: LLM) -> None:
    faults = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        buffers = [torch.ones(20 << 20, dtype=torch.uint8) for _ in range(6)]
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
        del buffers
    assert faults[-1] < 1_000, "120 MB came page by page."
