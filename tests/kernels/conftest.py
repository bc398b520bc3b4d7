"""Two processes of their own for the kernels, so that these tests run in any pytest session, next to any other test.

`interpreted` runs kernels on the CPU under Triton's interpreter; `compiled` compiles them for GPUs. Neither could be
done in the test process: Triton decides when it is imported, and other tests import it their own way.
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
