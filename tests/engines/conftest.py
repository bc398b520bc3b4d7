"""Real engines for the tests of this folder: tiny random models on both runners, the real 135M model on V1.

STEER_TEST_RUNNER picks the model runner: "v1" (default), or "v2", where every Triton kernel is interpreted. It must be
known before vLLM is imported, so a pytest process has one runner.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

import pytest

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")

if os.environ.get("STEER_TEST_RUNNER", "v1") == "v2":
    from helpers.interpreted import use_v2_runner

    use_v2_runner()

from helpers.engines import ROW_SETS, RUNNER, SETTINGS, VECTORS, assert_meant, kept, random_vector, tiny_engine
from helpers.oracle import Oracle
from helpers.traffic import Start

from steer_engine import LLM
from steer_engine.settings import SteeringConfig
from steer_engine.site import SITES_IN_BLOCKS


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`v1_only` tests do not exist on V2, and the other way round: they are left out, not skipped."""
    here = Path(__file__).parent
    for item in items:
        if RUNNER == "v2" and item.get_closest_marker("slow_on_v2") is not None:
            item.add_marker(pytest.mark.slow)
    other = {"v1": "v2_only", "v2": "v1_only"}[RUNNER]
    items[:] = [item for item in items if here not in item.path.parents or item.get_closest_marker(other) is None]


@pytest.fixture(scope="session")
def tiny(tiny_llama: str) -> LLM:
    """Eager engine of a random 3-block Llama that captures and steers at every block."""
    return tiny_engine(tiny_llama, capture=True, enforce_eager=True, max_num_batched_tokens=256)


@pytest.fixture(scope="session")
def tiny_compiled(tiny_llama: str) -> LLM:
    """The same without capture, compiled (V1 only: the V2 runner is not compiled under the interpreter)."""
    return tiny_engine(tiny_llama, max_num_batched_tokens=256)


@pytest.fixture(scope="session")
def tiny_sites(tiny_llama: str) -> LLM:
    """Like `tiny`, with edits at the outputs of attention and MLP too."""
    config = SteeringConfig(rows=8, sites=SITES_IN_BLOCKS)
    return tiny_engine(tiny_llama, capture=True, enforce_eager=True, max_num_batched_tokens=256, steering=config)


@pytest.fixture(scope="session")
def tiny_sites_compiled(tiny_llama: str) -> LLM:
    """The same without capture, compiled (V1 only)."""
    return tiny_engine(tiny_llama, max_num_batched_tokens=256, steering=SteeringConfig(rows=8, sites=SITES_IN_BLOCKS))


@pytest.fixture(scope="session")
def start(tiny_llama: str) -> Start:
    """Starts an eager tiny engine with other settings."""
    return partial(tiny_engine, tiny_llama, enforce_eager=True)


@pytest.fixture
def asynchronous(monkeypatch: pytest.MonkeyPatch) -> None:
    """The CPU platform switches it off; switched on again, the scheduler runs a step ahead of the sampled tokens."""
    from vllm.platforms.cpu import CpuPlatform

    original = CpuPlatform.check_and_update_config.__func__  # type: ignore[attr-defined]

    def checked(cls: Any, vllm_config: Any) -> None:
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(checked))


@pytest.fixture(scope="session")
def oracle(tiny_llama: str) -> Oracle:
    """The Hugging Face model behind `tiny`, with the same vectors."""
    return Oracle(tiny_llama, VECTORS, ROW_SETS)


@pytest.fixture(scope="session")
def real(smollm2: str) -> LLM:
    """Eager float32 engine of the real 135M model."""
    llm = LLM(
        smollm2,
        vectors={f"r{seed}": random_vector(seed, num_blocks=30, hidden_size=576, norm=4.0) for seed in range(32)},
        enforce_eager=True,
        dtype="float32",
        **SETTINGS,
    )
    assert_meant(llm, num_blocks=30)
    return kept(llm)
