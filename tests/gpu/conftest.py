"""Real engines on a GPU: the V2 runner, compiled, with CUDA graphs. `benchmarks/gpu.sh` runs these.

Without a GPU they are skipped. STEER_GPU_REHEARSAL=1 runs what can be run on the CPU's engine instead: it shows that
the tests themselves are sound, and nothing about a GPU.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pytest
import torch

from steer_engine import LLM, ControlVector

REHEARSAL = os.environ.get("STEER_GPU_REHEARSAL") == "1"
MODEL = "smollm2-135m"
SETTINGS: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 32, "gpu_memory_utilization": 0.25, "seed": 0}

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
if REHEARSAL:
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    SETTINGS["enforce_eager"] = True


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available() and not REHEARSAL:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


def random_vector(seed: int, num_blocks: int = 30, hidden_size: int = 576, norm: float = 8.0) -> ControlVector:
    rng = np.random.default_rng(seed)
    rows_LD = rng.standard_normal((num_blocks, hidden_size))
    rows_LD *= norm / np.linalg.norm(rows_LD, axis=1, keepdims=True)
    return ControlVector(directions={block: row.astype(np.float32) for block, row in enumerate(rows_LD)})


VECTORS = {f"r{seed}": random_vector(seed) for seed in range(8)}


@pytest.fixture(scope="session")
def llm() -> LLM:
    """Compiled float32 engine with CUDA graphs; vectors r0 to r7."""
    return LLM(MODEL, vectors=VECTORS, dtype="float32", max_logprobs=20, **SETTINGS)
