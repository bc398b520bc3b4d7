"""Pipeline parallelism: which of the model's blocks a worker has, and how its part of the model is run alone."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.forward_context import set_forward_context
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.sequence import IntermediateTensors

from steer_engine.engine.stream import ProbeRows, StreamForm, classify_output, perturb, stream_form
from steer_engine.errors import UnsupportedEngineError
from steer_engine.vllm.fused_norm import Pair, fusible, watching
from steer_engine.vllm.patching import Symbol

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.layernorm import RMSNorm


USED = (
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
    def handover_block(self) -> int | None:
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


def summed_stream(output: Any) -> torch.Tensor:
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

    armed: blocks of this worker's stage.

    Raises:
        UnsupportedEngineError: a block that carries no stream we know; names its class.
    """
    rows = ProbeRows(num_blocks=len(blocks))
    stage = Stage.of(blocks)
    alike = _witness(blocks, stage, armed)
    probed = sorted({*armed, *alike.values()})
    hidden_size = vllm_config.model_config.get_hidden_size()
    generator = torch.Generator().manual_seed(0)
    noise_D = torch.randn(hidden_size, generator=generator).to(device)
    shapes: dict[int, str] = {}
    pairs: dict[int, Pair] = {}

    def disturbing(block: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            shapes[block] = classify_output(output, rows, hidden_size)
            disturbed = perturb(output, block, rows, noise_D)
            if shapes[block] == "pair":
                pairs[block] = disturbed[:2]
            return disturbed

        return forward

    with watching(model, pairs) as norms, ExitStack() as stack:
        for block in probed:
            stack.enter_context(_forward_replaced(blocks[block], disturbing))(block)
        for layer in vllm_config.compilation_config.static_forward_context.values():
            if isinstance(layer, nn.Module):
                stack.enter_context(returning_zeros(layer))
        final_TD = _forward(model, stage, rows.num_rows, vllm_config, device)
    told = {
        block: stream_form(block, shapes.get(block, "nothing"), rows, final_TD, type(blocks[block]).__name__)
        for block in probed
        if block not in alike
    }
    for block, witness in alike.items():
        if shapes.get(block) != shapes[witness]:
            raise UnsupportedEngineError(f"Block {block} returns something else than block {witness}, its like.")
    forms = {block: told[alike.get(block, block)] for block in armed}
    return forms, fusible({block: norm for block, norm in norms.items() if block in forms}, forms)


def _witness(blocks: nn.ModuleList, stage: Stage, armed: tuple[int, ...]) -> dict[int, int]:
    """The block that ends a stage, if it is armed -> a block of its kind that tells for it.

    What the next stage makes of the two parts is not seen here: only a block that is followed by another tells.
    """
    last = stage.handover_block
    if last is None or last not in armed:
        return {}
    for witness in reversed(stage.blocks[:-1]):
        if type(blocks[witness]) is type(blocks[last]):
            return {last: witness}
    raise UnsupportedEngineError(
        f"Block {last} ({type(blocks[last]).__name__}) ends a stage of the pipeline that has no other block of its "
        "kind, so it cannot be told how it carries the stream. Use fewer stages, or leave the block out of "
        "--steering-blocks."
    )


def _forward(
    model: nn.Module, stage: Stage, num_tokens: int, vllm_config: VllmConfig, device: torch.device
) -> torch.Tensor:
    input_ids = torch.ones(num_tokens, dtype=torch.int64, device=device)
    positions = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    if vllm_config.model_config.uses_mrope:
        positions = positions.expand(3, num_tokens).contiguous()
    with torch.inference_mode(), set_forward_context(None, vllm_config, num_tokens=num_tokens, skip_compiled=True):
        incoming = stage.incoming(model, num_tokens, vllm_config.model_config.dtype, device)
        output = model(input_ids=input_ids, positions=positions, intermediate_tensors=incoming, inputs_embeds=None)
    return summed_stream(output).reshape(num_tokens, -1).float().cpu()


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
def returning_zeros(layer: nn.Module) -> Iterator[None]:
    """An attention-like layer whose output is zero: without metadata the real one returns uninitialised memory."""

    signature = inspect.signature(layer.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        given = signature.bind(*args, **kwargs).arguments
        if given.get("output") is not None:  # by position too: a short convolution's caller reads nothing else
            return given["output"].zero_()
        if given.get("output_shape") is not None:
            return tensors[0].new_zeros(given["output_shape"])
        zeros = torch.zeros_like(tensors[0])
        width = getattr(layer, "num_heads", 0) * getattr(layer, "head_size_v", getattr(layer, "head_size", 0))
        return zeros[..., :width] if 0 < width < zeros.shape[-1] else zeros

    layer.forward = forward
    try:
        yield
    finally:
        layer.__dict__.pop("forward", None)
