"""Settings of the arms. All compared arms use the same model, dtype and limits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Settings:
    """num_vectors: number of distinct vectors available to loads."""

    model: str
    dtype: str = "float32"
    eager: bool = True
    max_num_seqs: int = 256
    max_model_len: int = 2048
    memory: float = 0.2
    num_vectors: int = 256

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def compiled(self) -> Settings:
        return replace(self, eager=False)

    def engine_args(self) -> dict[str, Any]:
        """Keyword arguments of `vllm.LLM`."""
        return {
            "dtype": self.dtype,
            "enforce_eager": self.eager,
            "max_num_seqs": self.max_num_seqs,
            "max_model_len": self.max_model_len,
            "gpu_memory_utilization": self.memory,
            "block_size": 32,
            "seed": 0,
        }
