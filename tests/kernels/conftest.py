"""Two separate processes for the kernels, so that these tests can run in the same pytest session as all others.

`interpreted` runs kernels on the CPU under Triton's interpreter; `compiled` compiles them for GPUs. Triton chooses
between the two when it is imported, so neither can depend on how other tests import it in the test process.

With STEER_TEST_KERNELS=cuda, what the tests call interpreted runs on the GPU instead: the real compiled code.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from helpers.kernel_process import Process


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Process]:
    device = os.environ.get("STEER_TEST_KERNELS")
    process = Process(STEER_KERNEL_DEVICE=device) if device else Process(TRITON_INTERPRET="1")
    yield process
    process.close()


@pytest.fixture(scope="session")
def compiled() -> Iterator[Process]:
    process = Process()
    yield process
    process.close()
