"""Pipeline parallelism: which of the model's blocks a worker has, and how its part of the model is run alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.sequence import IntermediateTensors

from steer_engine.errors import UnsupportedEngineError
from steer_engine.runtime.vllm.patching import Symbol

SYMBOLS = (
    Symbol("vllm.model_executor.models.utils:PPMissingLayer"),
    Symbol("vllm.sequence:IntermediateTensors"),
)

STREAM_KEYS = {"hidden_states", "residual"}
"""What stages hand on whose blocks carry one residual stream; others hand on more (deep-stacked images, say)."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The blocks of one worker, by their numbers in the whole model: all of them without a pipeline.

    vLLM keeps the whole list on each worker, with a placeholder for each block that another one has.
    """

    blocks: tuple[int, ...]
    num_blocks: int

    @classmethod
    def of(cls, blocks: nn.ModuleList) -> Stage:
        here = tuple(number for number, block in enumerate(blocks) if not isinstance(block, PPMissingLayer))
        return cls(blocks=here, num_blocks=len(blocks))

    @property
    def is_first(self) -> bool:
        return 0 in self.blocks

    @property
    def is_last(self) -> bool:
        return self.num_blocks - 1 in self.blocks

    @property
    def hands_on(self) -> int | None:
        """The block whose output goes to the next stage."""
        return None if self.is_last or not self.blocks else self.blocks[-1]

    def among(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """Those of `blocks` that are here."""
        return tuple(block for block in blocks if block in self.blocks)

    def incoming(self, model: Any, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Any:
        """What the stage before would hand on, for a trial: the same noise in every row. None on the first."""
        if self.is_first:
            return None
        generator = torch.Generator().manual_seed(1)
        incoming = model.make_empty_intermediate_tensors(num_tokens, dtype, device)
        for tensor in incoming.tensors.values():
            noise_D = torch.randn(tensor.shape[-1], generator=generator)
            tensor.copy_(noise_D.to(dtype).expand_as(tensor))
        return incoming


def stream_after(output: Any) -> torch.Tensor:
    """The stream that a stage hands on, as the sum that the next one takes it for; other outputs as they are.

    Raises:
        UnsupportedEngineError: it hands on something else beside the stream.
    """
    if isinstance(output, IntermediateTensors):
        if unknown := sorted(set(output.tensors) - STREAM_KEYS):
            raise UnsupportedEngineError(
                f"A stage of the pipeline hands on {', '.join(unknown)[:200]}; such models cannot be steered with "
                "pipeline parallelism yet."
            )
        parts = [part for part in output.tensors.values() if part is not None]
        return torch.stack([part.float() for part in parts]).sum(0)
    if isinstance(output, tuple):
        output = output[0]
    assert isinstance(output, torch.Tensor)
    return output
