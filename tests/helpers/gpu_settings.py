"""Settings of the GPU tests."""

from __future__ import annotations

import os
from typing import Any

import numpy as np

from steer_engine import ControlVector

REHEARSAL = os.environ.get("STEER_GPU_REHEARSAL") == "1"
MODEL = "smollm2-135m"
SETTINGS: dict[str, Any] = {"max_model_len": 512, "max_num_seqs": 32, "gpu_memory_utilization": 0.25, "seed": 0}
if REHEARSAL:
    SETTINGS["enforce_eager"] = True


def random_vector(seed: int, num_blocks: int = 30, hidden_size: int = 576, norm: float = 8.0) -> ControlVector:
    rng = np.random.default_rng(seed)
    rows_LD = rng.standard_normal((num_blocks, hidden_size))
    rows_LD *= norm / np.linalg.norm(rows_LD, axis=1, keepdims=True)
    return ControlVector(directions={block: row.astype(np.float32) for block, row in enumerate(rows_LD)})


VECTORS = {f"r{seed}": random_vector(seed) for seed in range(8)}
