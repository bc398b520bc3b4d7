"""Two separate processes for the kernels, so that these tests can run in the same pytest session as all others.

`interpreted` runs kernels on the CPU under Triton's interpreter; `compiled` compiles them for GPUs. Triton chooses
between the two when it is imported, so neither can depend on how other tests import it in the test process.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from helpers.kernel_process import Process


@pytest.fixture(scope="session")
def interpreted() -> Iterator[Process]:
    process = Process(TRITON_INTERPRET="1")
    yield process
    process.close()


@pytest.fixture(scope="session")
def compiled() -> Iterator[Process]:
    process = Process()
    yield process
    process.close()
