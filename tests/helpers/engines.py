"""Settings and helpers for real engines in tests. Import nothing of vLLM before `conftest` has chosen the runner."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from steer_engine.settings import SteeringConfig
from steer_engine.vectors import ControlVector, RowSet, VectorMetadata

if TYPE_CHECKING:
    from steer_engine import LLM  # which imports vLLM; tests of servers do not need it

RUNNER = os.environ.get("STEER_TEST_RUNNER", "v1")
DEVICE = os.environ.get("STEER_TEST_DEVICE", "cpu")
"""`gpu` in tests/gpu, where there is one."""
RUNNER_CLASS = {
    ("cpu", "v1"): "vllm.v1.worker.cpu_model_runner.CPUModelRunner",
    ("cpu", "v2"): "vllm.v1.worker.cpu.model_runner.CPUModelRunner",
    ("gpu", "v1"): "vllm.v1.worker.gpu_model_runner.GPUModelRunner",
    ("gpu", "v2"): "vllm.v1.worker.gpu.model_runner.GPUModelRunner",
}[DEVICE, RUNNER]
KERNEL = "torch" if (DEVICE, RUNNER) == ("cpu", "v1") else "triton"

TINY_BLOCKS, TINY_HIDDEN, TINY_VOCAB = 3, 64, 512
SETTINGS: dict[str, Any] = {
    "gpu_memory_utilization": 0.2,
    "max_model_len": 512,
    "max_num_seqs": 32,
    "block_size": 32,
    "num_gpu_blocks_override": 256,  # engines stay to the end: all of them must fit
    "seed": 0,
}


_ENGINES: list[Any] = []


def kept(llm: Any) -> Any:
    """Keep an engine alive to the end: one that is collected takes the process groups of all others with it."""
    _ENGINES.append(llm)
    return llm


def random_vector(
    seed: int, *, num_blocks: int = TINY_BLOCKS, hidden_size: int = TINY_HIDDEN, norm: float = 1.0
) -> ControlVector:
    """A direction of length `norm` at every block."""
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((num_blocks, hidden_size))
    rows *= norm / np.linalg.norm(rows, axis=1, keepdims=True)
    directions = {block: row.astype(np.float32) for block, row in enumerate(rows)}
    return ControlVector(directions=directions, metadata=VectorMetadata())


VECTORS = {f"r{seed}": random_vector(seed) for seed in range(32)}


def random_rows(seed: int, kind: Literal["features", "low_rank"], *, threshold: bool = False) -> RowSet:
    """Features 3 and 40 at block 1, or an orthonormal R and a random W of rank 3 at all blocks."""
    rng = np.random.default_rng(seed)

    def rows(count: int) -> np.ndarray:
        return (rng.standard_normal((count, TINY_HIDDEN)) / TINY_HIDDEN**0.5).astype(np.float32)

    if kind == "features":
        limits = {1: np.array([0.05, 0.1], np.float32)} if threshold else {}
        bias, numbers = {1: np.array([0.1, -0.05], np.float32)}, {1: np.array([3, 40])}
        return RowSet(kind=kind, read={1: rows(2)}, write={1: rows(2)}, bias=bias, threshold=limits, indices=numbers)
    blocks = range(TINY_BLOCKS)
    write = {block: np.linalg.qr(rows(3).T)[0].T.astype(np.float32) for block in blocks}
    return RowSet(kind=kind, read={b: rows(3) for b in blocks}, write=write, bias={b: rows(1)[0, :3] for b in blocks})


ROW_SETS = {
    "relu": random_rows(1, "features"),
    "jump": random_rows(2, "features", threshold=True),
    "reft": random_rows(3, "low_rank"),
}


def assert_meant(llm: LLM, *, num_blocks: int, form: str = "split") -> None:
    """The engine is the one that a test means: runner class, kernel, armed blocks, stream form."""
    worker = llm.steering_status()["workers"][0]
    assert worker["runner"] == RUNNER_CLASS
    assert worker["kernel"] == KERNEL
    assert worker["armed_blocks"] == list(range(num_blocks))
    assert set(worker["forms"].values()) == {form}


def tiny_engine(model: str, **settings: Any) -> LLM:
    """An engine of `tiny_llama`, kept to the end, with vectors r0..r31 of norm 1; float32 unless `settings` say so."""
    from steer_engine import LLM

    # Mixed traffic asks for more rows at a block than the default has room for.
    settings = {"dtype": "float32", "steering": SteeringConfig(rows=8), **SETTINGS, **settings}
    llm = LLM(model, vectors={**VECTORS, **ROW_SETS}, max_logprobs=TINY_VOCAB, **settings)
    assert_meant(llm, num_blocks=TINY_BLOCKS)
    engine: LLM = kept(llm)
    return engine
