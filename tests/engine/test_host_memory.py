"""Memory of a step is kept for the next, by the C library itself: page faults are counted."""

from __future__ import annotations

import os
import platform
import subprocess
import sys

import pytest

STEPS = """
import resource
import sys
import numpy as np
from steer_engine.vllm.arming import keep_freed_memory

def step():
    buffers = [np.ones(20 << 20, np.uint8) for _ in range(6)]

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
step()
step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    step()
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def steps(how: str, **environment: str) -> tuple[str, int]:
    """What `keep_freed_memory` said, and the pages that five steps of 120 MB had to get anew."""
    # A preloaded allocator has its own ways.
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "LD_PRELOAD"))}
    done = subprocess.run(
        [sys.executable, "-c", STEPS, how], env=clean | environment, capture_output=True, text=True, check=True
    )
    said, faults = done.stdout.split()
    return said, int(faults)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="A setting of glibc.")
def test_steps_find_their_memory_again() -> None:
    _, given_back = steps("as it is")
    said, kept = steps("keep")
    assert said == "True"
    assert given_back > 1_000, "The C library keeps it by itself: then the setting is not needed."
    assert kept < given_back / 10


def test_what_the_environment_says_stands() -> None:
    assert steps("keep", MALLOC_TRIM_THRESHOLD_="131072")[0] == "False"
