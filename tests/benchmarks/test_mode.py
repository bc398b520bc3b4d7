from __future__ import annotations

from dataclasses import replace

import pytest
from steer_bench.load import Load, Steering
from steer_bench.mode import engine_of, mode_of

V1 = {"eager": False, "runner": "vllm.v1.worker.cpu_model_runner.CPUModelRunner", "kernel": "torch"}
V2 = {"eager": True, "runner": "vllm.v1.worker.gpu.model_runner.GPUModelRunner"}
LOAD = Load(num_requests=2, concurrency=32, max_tokens=4)


def test_an_engine_is_named_by_its_facts() -> None:
    assert engine_of(V1) == "compiled, V1 (torch)"
    assert engine_of(V2) == "eager, V2"


@pytest.mark.parametrize(
    ("steering", "edits"),
    [
        (Steering.NONE, "no edits"),
        (Steering.ADD, "`add`"),
        (Steering.DIRECTIONAL, "`ablate`, `clamp`, `add_relative`"),
    ],
)
def test_a_mode_names_the_requested_and_armed_operations(steering: Steering, edits: str) -> None:
    load = replace(LOAD, steering=steering)
    assert mode_of(V1, load) == f"compiled, V1 (torch), 32 at once, {edits}, all operations armed"
