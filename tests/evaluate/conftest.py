"""One tiny engine for the tests of this folder, as an evaluation opens it."""

from __future__ import annotations

import os

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

if os.environ.get("STEER_TEST_RUNNER") == "v2":
    from helpers.interpreted import use_v2_runner

    use_v2_runner()

import pytest

from steer_engine import LLM
from steer_engine.evaluate.scorer import open_engine


@pytest.fixture(scope="session")
def tiny_engine(tiny_llama: str) -> LLM:
    """Random 3-block Llama, float32; on the V1 runner, or on V2 with STEER_TEST_RUNNER=v2."""
    # Small batches: the V2 runner warms up with a full one, interpreted.
    batch = {"max_num_batched_tokens": 256, "max_num_seqs": 32}
    return open_engine(tiny_llama, dtype="float32", max_model_len=768, gpu_memory_utilization=0.2, seed=0, **batch)
