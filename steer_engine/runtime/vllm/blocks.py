"""Finds the transformer blocks of a loaded model, and finds out how each carries the residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.forward_context import set_forward_context

from steer_engine.errors import UnsupportedEngineError
from steer_engine.runtime.stream import ProbeRows, StreamForm, disturb, shape_of, stream_form
from steer_engine.runtime.vllm.fused_norm import Pair, fusible, watching

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.layernorm import RMSNorm

_NOT_TEXT = ("vision", "visual", "audio", "image", "speech", "encoder")


def find_blocks(model: nn.Module, num_blocks: int) -> nn.ModuleList:
    """The one list of `num_blocks` transformer blocks of the (language) model.

    Raises:
        UnsupportedEngineError: there is none, or more than one.
    """
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_blocks
        and not any(word in name for word in _NOT_TEXT)
        and not any(isinstance(block, nn.ModuleList) for block in module)
    }
    # A list inside a block (experts, say) may have the same length: the outermost is meant.
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if len(outermost) != 1:
        raise UnsupportedEngineError(
            f"Cannot tell the {num_blocks} transformer blocks of {type(model).__name__}: candidates {outermost}."
        )
    return found[outermost[0]]


def probe_forms(
    model: nn.Module, blocks: nn.ModuleList, armed: tuple[int, ...], vllm_config: VllmConfig, device: torch.device
) -> tuple[dict[int, StreamForm], dict[int, RMSNorm]]:
    """How each armed block carries the stream, and the norm that takes it, by one tiny forward pass without attention.

    Raises:
        UnsupportedEngineError: a block that carries no stream we know; names its class.
    """
    rows = ProbeRows(num_blocks=len(blocks))
    hidden_size = vllm_config.model_config.get_hidden_size()
    generator = torch.Generator().manual_seed(0)
    noise_D = torch.randn(hidden_size, generator=generator).to(device)
    shapes: dict[int, str] = {}
    pairs: dict[int, Pair] = {}

    def disturbing(block: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            shapes[block] = shape_of(output, rows, hidden_size)
            disturbed = disturb(output, block, rows, noise_D)
            if shapes[block] == "pair":
                pairs[block] = disturbed[:2]
            return disturbed

        return forward

    with watching(model, pairs) as norms, ExitStack() as stack:
        for block in armed:
            stack.enter_context(_forward_replaced(blocks[block], disturbing))(block)
        for layer in vllm_config.compilation_config.static_forward_context.values():
            if isinstance(layer, nn.Module):
                stack.enter_context(_silenced(layer))
        final_TD = _forward(model, rows.num_rows, vllm_config, device)
    forms = {
        block: stream_form(block, shapes.get(block, "nothing"), rows, final_TD, type(blocks[block]).__name__)
        for block in armed
    }
    return forms, fusible(norms, forms)


def _forward(model: nn.Module, num_tokens: int, vllm_config: VllmConfig, device: torch.device) -> torch.Tensor:
    input_ids = torch.ones(num_tokens, dtype=torch.int64, device=device)
    positions = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    if vllm_config.model_config.uses_mrope:
        positions = positions.expand(3, num_tokens).contiguous()
    with torch.inference_mode(), set_forward_context(None, vllm_config, num_tokens=num_tokens, skip_compiled=True):
        output = model(input_ids=input_ids, positions=positions, intermediate_tensors=None, inputs_embeds=None)
    if isinstance(output, tuple):
        output = output[0]
    assert isinstance(output, torch.Tensor)
    return output.reshape(num_tokens, -1).float().cpu()


@contextmanager
def _forward_replaced(
    module: nn.Module, make: Callable[[int, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[Callable[[int], None]]:
    def replace(block: int) -> None:
        module.forward = make(block, module.forward)

    try:
        yield replace
    finally:
        module.__dict__.pop("forward", None)


@contextmanager
def _silenced(layer: nn.Module) -> Iterator[None]:
    """An attention-like layer whose output is zero: without metadata the real one returns uninitialised memory."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        output = kwargs.get("output")
        if output is not None:
            output.zero_()
            return output
        shape = kwargs.get("output_shape")
        if shape is not None:
            return tensors[0].new_zeros(shape)
        zeros = torch.zeros_like(tensors[0])
        width = getattr(layer, "num_heads", 0) * getattr(layer, "head_size_v", getattr(layer, "head_size", 0))
        return zeros[..., :width] if 0 < width < zeros.shape[-1] else zeros

    layer.forward = forward
    try:
        yield
    finally:
        layer.__dict__.pop("forward", None)
