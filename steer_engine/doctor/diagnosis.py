"""What the doctor found out, as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(kw_only=True)
class Diagnosis:
    """Filled in as far as the examination got; it serves if nothing stands against it.

    forms: stream form -> the blocks of the probed copy that have it. memory: bytes, on each rank.
    """

    model: str
    against: list[str] = field(default_factory=list)
    """Why it can't be served steered."""
    vllm: str = ""
    num_symbols: int = 0
    """Symbols of vLLM that Steer Engine touches."""
    num_different: int = 0
    """Those that are not as it knows them."""
    architecture: str = ""
    hidden_size: int = 0
    num_blocks: int = 0
    dtype: str = ""
    armed_blocks: list[int] = field(default_factory=list)
    ops: list[str] = field(default_factory=list)
    rows: int = 0
    max_num_seqs: int = 0
    max_num_batched_tokens: int = 0
    runner: str = ""
    runner_reason: str = ""
    probed_blocks: int = 0
    """0: nothing was loaded."""
    forms: dict[str, list[int]] = field(default_factory=dict)
    kernel: str = ""
    fused_blocks: int = 0
    """Of the probed ones, whose edit happens inside the norm that follows."""
    memory: dict[str, int] = field(default_factory=dict)

    @property
    def serves(self) -> bool:
        return not self.against

    def to_json(self) -> dict[str, Any]:
        return {"serves": self.serves, **asdict(self)}
