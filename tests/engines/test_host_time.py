"""The benchmark's timers fit an engine: they time what they say, and leave it as it was."""

from __future__ import annotations

from typing import Any

import pytest
from helpers.driving import edit, generate, steering, tokens
from steer_bench.arms.host_time import host_time
from steer_bench.load import Load

from steer_engine import LLM


class Arm:
    """What the benchmark needs of an arm: an engine in this process, and a load to run on it."""

    def __init__(self, llm: LLM) -> None:
        self.llm, self.engine = llm, llm.llm_engine

    def run(self, load: Load) -> None:
        specs = [steering(edit("r8", 1.0))] * load.num_requests
        generate(self.llm, [tokens(seed, 6) for seed in range(load.num_requests)], specs, max_tokens=load.max_tokens)


@pytest.mark.v1_only
def test_host_time(tiny: LLM) -> None:
    load = Load(num_requests=4, concurrency=4, max_tokens=12, num_vectors=1)
    runner: Any = tiny.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    adapter = runner._steer_adapter
    before = dict(vars(adapter.runtime)), dict(vars(adapter))
    found = host_time(Arm(tiny), load)
    assert found["requests"] == 4
    assert found["steps"] == 12
    assert all(
        found[f"{name}_us"] > 0 for name in ("decode_step", "prefill_step", "edit_per_site", "admit_per_request")
    )
    assert (vars(adapter.runtime).keys(), vars(adapter).keys()) == tuple(
        each.keys() - {"edit", "edit_and_norm"} for each in before
    )
