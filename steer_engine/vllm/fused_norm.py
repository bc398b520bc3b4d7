"""Edits inside the fused add and RMSNorm that follows a block: one launch less per site, one rounding less per row.

Off by default (`SteeringConfig.fuse_norm`): vLLM's own norm rounds differently, so the outputs of unsteered requests
are no longer bit-identical to plain vLLM. Replaces `forward` of `RMSNorm` instances. The startup probe finds the norm
of each block: the one that is called with the same two tensors that the block returned. Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, Final

import torch
from steer_kernels.launch_table import MAX_NORMED_BYTES
from torch import nn
from vllm.model_executor.layers.layernorm import RMSNorm

from steer_engine.engine import op
from steer_engine.engine.stream import StreamForm
from steer_engine.vllm.patching import Symbol

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.config import VllmConfig


USED: Final = (
    Symbol("vllm.model_executor.layers.layernorm:RMSNorm.__init__", ("hidden_size", "eps", "var_hidden_size")),
    Symbol("vllm.model_executor.layers.layernorm:RMSNorm.forward_native", ("x", "residual")),
)

Pair = tuple[torch.Tensor, torch.Tensor]


def reason_not_to_fuse(vllm_config: VllmConfig) -> str | None:
    """Why edits cannot be fused with the norms of this engine, or None."""
    model_config = vllm_config.model_config
    if vllm_config.parallel_config.tensor_parallel_size > 1:
        return "tensor parallelism fuses the norm with its all-reduce"
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        return "the norm after a block may be on the next pipeline stage"
    if model_config.quantization is not None:
        return "quantised models fuse the norm with quantisation"
    if vllm_config.speculative_config is not None:
        return "draft models may use the stream between a block and the next norm"
    if model_config.get_hidden_size() * model_config.dtype.itemsize > MAX_NORMED_BYTES:
        return f"a row of more than {MAX_NORMED_BYTES:,} bytes doesn't fit in the kernel's registers"
    return None


@contextmanager
def find_following_norms(model: nn.Module, outputs: Mapping[int, Pair]) -> Iterator[dict[int, RMSNorm]]:
    """Record, while the probe runs, which norm is called with the pair that a block returned.

    outputs: block -> the pair that it returned, filled by the probe. Yields block -> norm, filled likewise.
    """
    found: dict[int, RMSNorm] = {}

    def recorded(norm: RMSNorm) -> Callable[..., Any]:
        original = norm.forward

        def forward(x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
            for block, pair in outputs.items():
                if x is pair[0] and residual is pair[1]:
                    found[block] = norm
            return original(x, residual)

        return forward

    with ExitStack() as stack:
        for norm in [module for module in model.modules() if type(module) is RMSNorm]:
            norm.forward = recorded(norm)
            stack.callback(norm.__dict__.pop, "forward")
        yield found


def fusible_norms(norms: Mapping[int, RMSNorm], forms: Mapping[int, StreamForm]) -> dict[int, RMSNorm]:
    """The norms that edits can be fused with, by block.

    They need a split stream, and a plain weighted norm that follows no other block.
    """
    owners = list(norms.values())
    return {
        block: norm
        for block, norm in norms.items()
        if forms[block] is StreamForm.SPLIT
        and norm.has_weight
        and norm.variance_size_override is None
        and owners.count(norm) == 1
    }


def fuse(norm: RMSNorm, site: int) -> None:
    """Let `norm` edit the stream at `site` too. Calls without a residual are unchanged."""
    original = norm.forward

    def forward(x: torch.Tensor, residual: torch.Tensor | None = None) -> Any:
        if residual is None:
            return original(x)
        op.add_rms_norm_edit(x, residual, norm.weight, site, norm.variance_epsilon)
        return x, residual

    norm.forward = forward
