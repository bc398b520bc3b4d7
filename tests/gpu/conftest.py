"""Real engines on a GPU, compiled, with CUDA graphs. `benchmarks/gpu.sh` runs these, once per model runner.

STEER_TEST_RUNNER picks the runner: "v2" (default) or "v1". Without a GPU the tests are skipped. STEER_GPU_REHEARSAL=1
runs what can be run on the CPU's eager engine instead: it shows that the tests themselves are sound, and nothing about
a GPU.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from helpers.gpu_settings import REHEARSAL, SETTINGS, choose_runner

if REHEARSAL:  # Triton's interpreter is chosen before torch is imported
    choose_runner()

import torch

if torch.cuda.is_available() and not REHEARSAL:
    choose_runner()

from helpers.engines import ROW_SETS, VECTORS, kept, random_vector, tiny_engine
from helpers.oracle import Oracle

from steer_engine import LLM
from steer_engine.settings import SteeringConfig
from steer_engine.site import SITES_IN_BLOCKS

REAL_VECTORS = {f"r{seed}": random_vector(seed, num_blocks=30, hidden_size=576, norm=8.0) for seed in range(8)}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if item.get_closest_marker("timeout") is None:
                item.add_marker(pytest.mark.timeout(900))  # the first test with an engine waits until it is compiled
            if not torch.cuda.is_available() and not REHEARSAL:
                item.add_marker(pytest.mark.skip(reason="needs a GPU"))


@pytest.fixture(scope="session")
def tiny(tiny_llama: str) -> LLM:
    """Compiled engine with graphs of a random 3-block Llama: captures and edits at all blocks and sites."""
    config = SteeringConfig(rows=8, sites=SITES_IN_BLOCKS)
    settings = {"enforce_eager": REHEARSAL, "max_num_batched_tokens": 256}
    return tiny_engine(tiny_llama, capture=True, steering=config, **settings)


@pytest.fixture(scope="session")
def oracle(tiny_llama: str) -> Oracle:
    """The Hugging Face model behind `tiny`, on the processor, with the same vectors."""
    return Oracle(tiny_llama, VECTORS, ROW_SETS)


@pytest.fixture(scope="session")
def real(smollm2: str) -> LLM:
    """Compiled float32 engine of the real 135M model with CUDA graphs; vectors r0 to r7 of norm 8."""
    llm: LLM = kept(LLM(smollm2, vectors=REAL_VECTORS, dtype="float32", max_logprobs=20, **SETTINGS))
    return llm


@pytest.fixture(scope="session")
def real_oracle(smollm2: str) -> Oracle:
    return Oracle(smollm2, REAL_VECTORS)
