"""Real engines on a GPU: the V2 runner, compiled, with CUDA graphs. `benchmarks/gpu.sh` runs these.

Without a GPU they are skipped. STEER_GPU_REHEARSAL=1 runs what can be run on the CPU's engine instead: it shows that
the tests themselves are sound, and nothing about a GPU.
"""

from __future__ import annotations

import os

import pytest
import torch
from helpers.gpu_settings import MODEL, REHEARSAL, SETTINGS, VECTORS

from steer_engine import LLM

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
if REHEARSAL:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available() and not REHEARSAL:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def llm() -> LLM:
    """Compiled float32 engine with CUDA graphs; vectors r0 to r7."""
    return LLM(MODEL, vectors=VECTORS, dtype="float32", max_logprobs=20, **SETTINGS)
