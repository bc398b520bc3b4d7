"""Settings of the GPU tests. Import nothing of vLLM before `choose_runner`."""

from __future__ import annotations

import os
from typing import Any

REHEARSAL = os.environ.get("STEER_GPU_REHEARSAL") == "1"
SETTINGS: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 32, "gpu_memory_utilization": 0.25, "seed": 0}
if REHEARSAL:
    SETTINGS["enforce_eager"] = True

MOST = 5e-4
"""Nats by which plain vLLM may differ from Hugging Face in float32: other kernels, other orders of sums. What each test
allows a steered answer follows from what it measures without steering."""


def choose_runner() -> None:
    """Set the variables of the runner that STEER_TEST_RUNNER names, V2 by default, on a GPU or for a rehearsal."""
    runner = os.environ.setdefault("STEER_TEST_RUNNER", "v2")
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if REHEARSAL:
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        if runner == "v2":
            from helpers.interpreted import use_v2_runner

            use_v2_runner()
        return
    os.environ["STEER_TEST_DEVICE"] = "gpu"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = {"v1": "0", "v2": "1"}[runner]
    # Attention in float32 is Triton's. By default its products have the 10 bits of TF32, too few to compare.
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")
