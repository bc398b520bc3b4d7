"""A model's transformer blocks on one worker: which ones it has, and the startup probe of how they carry the stream.

With pipeline parallelism a worker has only some of the blocks. The probe runs this part of the model alone, with a
made-up input in place of the earlier stages. Uses `PPMissingLayer` and `IntermediateTensors` of vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import inspect
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.forward_context import set_forward_context
from vllm.model_executor.models.utils import PPMissingLayer
from vllm.sequence import IntermediateTensors

from steer_engine.engine.stream import LEAVE_OUT, ProbeRows, StreamForm, classify_output, perturb, stream_form
from steer_engine.errors import UnsupportedEngineError
from steer_engine.vllm.fused_norm import Pair, find_following_norms, fusible_norms
from steer_engine.vllm.patching import Symbol

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.model_executor.layers.layernorm import RMSNorm


USED = (
    Symbol("vllm.model_executor.models.utils:PPMissingLayer"),
    Symbol("vllm.sequence:IntermediateTensors"),
)

STREAM_KEYS = {"hidden_states", "residual"}
"""What a pipeline stage passes on if its blocks carry one residual stream. Others pass on more, e.g. images."""

NOT_TEXT = ("vision", "visual", "audio", "image", "speech")
"""Words in the module names of encoders. Their blocks do not belong to the language model."""

ENCODER = "encoder"
"""Means an encoder only beside another list: ChatGLM's decoder is called so. If the list is an encoder after all, the
probe refuses it, because a text does not run through it."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """The blocks of one worker, by their numbers in the whole model. Without pipeline parallelism: all of them.

    vLLM keeps the full list on each worker, with a placeholder for each block of another worker.
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
        """The block whose output goes to the next stage; None on the last stage."""
        return None if self.is_last or not self.blocks else self.blocks[-1]

    def among(self, blocks: tuple[int, ...]) -> tuple[int, ...]:
        """Those of `blocks` that this worker has."""
        return tuple(block for block in blocks if block in self.blocks)

    def noise_input(self, model: Any, num_tokens: int, dtype: torch.dtype, device: torch.device) -> Any:
        """Noise in place of the previous stage's output, the same in every row. None on the first stage."""
        if self.is_first:
            return None
        generator = torch.Generator().manual_seed(1)
        tensors = model.make_empty_intermediate_tensors(num_tokens, dtype, device)
        for tensor in tensors.tensors.values():
            noise_D = torch.randn(tensor.shape[-1], generator=generator)
            tensor.copy_(noise_D.to(dtype).expand_as(tensor))
        return tensors


def find_blocks(model: nn.Module, num_blocks: int) -> nn.ModuleList:
    """The one list of `num_blocks` transformer blocks of the (language) model.

    Raises:
        UnsupportedEngineError: there is no such list, or more than one.
    """
    found = _lists_of_blocks(model, num_blocks)
    if len(found) > 1:
        found = {name: blocks for name, blocks in found.items() if ENCODER not in name} or found
    if len(found) != 1:
        raise UnsupportedEngineError(
            f"Cannot identify the {num_blocks} transformer blocks of {type(model).__name__}: candidates "
            f"{sorted(found)}. Start it without steering."
        )
    return next(iter(found.values()))


def _lists_of_blocks(model: nn.Module, num_blocks: int) -> dict[str, nn.ModuleList]:
    """The outermost lists of `num_blocks` modules outside encoders of other media, each once, by name."""
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == num_blocks
        and not any(word in name for word in NOT_TEXT)
        and not any(isinstance(block, nn.ModuleList) for block in module)
    }
    # A list inside a block (of experts, for example) can have the same length. The outermost list is the right one.
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    # Gemma 4 has a second list of the same modules, for a part of the model that is compiled by itself.
    first_name: dict[tuple[int, ...], str] = {}
    for name in outermost:
        first_name.setdefault(tuple(map(id, found[name])), name)
    return {name: found[name] for name in first_name.values()}


def probe_forms(
    model: nn.Module, blocks: nn.ModuleList, armed: tuple[int, ...], vllm_config: VllmConfig, device: torch.device
) -> tuple[dict[int, StreamForm], dict[int, RMSNorm]]:
    """How each armed block carries the stream, and the norms that edits can be fused with, by block.

    Runs one small forward pass in which attention does not look at other rows.

    armed: blocks of this worker's stage.

    Raises:
        UnsupportedEngineError: a block carries the stream in no known form, or runs several times. The message names
            its class.
    """
    rows = ProbeRows(num_blocks=len(blocks))
    stage = Stage.of(blocks)
    substitute = _substitute(blocks, stage, armed)
    probed = sorted({*armed, *substitute.values()})
    hidden_size = vllm_config.model_config.get_hidden_size()
    generator = torch.Generator().manual_seed(0)
    noise_D = torch.randn(hidden_size, generator=generator).to(device)
    shapes: dict[int, str] = {}
    pairs: dict[int, Pair] = {}
    calls: Counter[int] = Counter()

    def perturbing(block: int, original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            calls[block] += 1
            shapes[block] = classify_output(output, rows, hidden_size)
            perturbed = perturb(output, block, rows, noise_D)
            if shapes[block] == "pair":
                pairs[block] = perturbed[:2]
            return perturbed

        return forward

    with find_following_norms(model, pairs) as norms, ExitStack() as stack:
        for block in probed:
            stack.enter_context(_forward_replaced(blocks[block], perturbing(block, blocks[block].forward)))
        final_TD = probe_pass(model, stage, rows.num_rows, vllm_config, device)
    for block in probed:
        if calls[block] > 1:
            raise UnsupportedEngineError(
                f"Block {block} ({type(blocks[block]).__name__}) runs {calls[block]} times in one forward pass; models "
                f"that loop over their blocks cannot be steered yet. {LEAVE_OUT}, or start the model unarmed."
            )
    detected = {
        block: stream_form(block, shapes.get(block, "nothing"), rows, final_TD, type(blocks[block]).__name__)
        for block in probed
        if block not in substitute
    }
    for block, other in substitute.items():
        if shapes.get(block) != shapes[other]:
            raise UnsupportedEngineError(
                f"Blocks {block} and {other} have the same class but return different outputs, so the form of block "
                f"{block} is unknown. {LEAVE_OUT}."
            )
    forms = {block: detected[substitute.get(block, block)] for block in armed}
    return forms, fusible_norms({block: norm for block, norm in norms.items() if block in forms}, forms)


def summed_stream(output: Any) -> torch.Tensor:
    """The stream that a stage passes on: the sum of its parts. Outputs of the last stage are returned as they are.

    Raises:
        UnsupportedEngineError: the stage passes on something besides the stream.
    """
    if isinstance(output, IntermediateTensors):
        if unknown := sorted(set(output.tensors) - STREAM_KEYS):
            raise UnsupportedEngineError(
                f"A pipeline stage passes on {', '.join(unknown)[:200]}; such models cannot be steered with pipeline "
                "parallelism yet."
            )
        parts = [part for part in output.tensors.values() if part is not None]
        return torch.stack([part.float() for part in parts]).sum(0)
    if isinstance(output, tuple):
        output = output[0]
    assert isinstance(output, torch.Tensor)
    return output


@contextmanager
def row_local(layer: nn.Module, num_rows: int) -> Iterator[None]:
    """Make an attention-like layer return a function of its own row's inputs, for T = `num_rows` token rows.

    Without metadata the real one returns uninitialised memory. Zeros would hide a part of a block's output that only
    attention reads, such as rows that are already normalised for the next block.
    """
    signature = inspect.signature(layer.forward)

    def forward(*args: Any, **kwargs: Any) -> Any:
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        given = signature.bind(*args, **kwargs).arguments
        output = given.get("output")  # by name or by position; the caller of a short convolution uses only this
        if output is not None:
            return output.copy_(_mixed([each for each in tensors if each is not output], output.shape, num_rows))
        first = tensors[0]
        if given.get("output_shape") is not None:
            return _mixed(tensors, given["output_shape"], num_rows).to(first.dtype)
        width = getattr(layer, "num_heads", 0) * getattr(layer, "head_size_v", getattr(layer, "head_size", 0))
        shape = (*first.shape[:-1], width) if 0 < width < first.shape[-1] else first.shape
        return _mixed(tensors, shape, num_rows).to(first.dtype)

    with _forward_replaced(layer, forward):
        yield


def _mixed(inputs: list[torch.Tensor], shape: Sequence[int], num_rows: int) -> torch.Tensor:
    """float32 of this shape: the mean over the inputs of tanh of each, its row repeated or cut to the output's.

    tanh keeps a row's size near that of real attention, whatever the size of its inputs.
    """
    width = math.prod(shape) // num_rows
    rows_TE = [
        each.reshape(num_rows, -1).float()
        for each in inputs
        if each.is_floating_point() and num_rows in each.shape[:2] and each.numel() >= num_rows
    ]
    if not rows_TE or num_rows not in tuple(shape)[:2]:
        return torch.zeros(tuple(shape), device=inputs[0].device)
    parts_TE = [each.tanh().repeat(1, -(-width // each.shape[1]))[:, :width] for each in rows_TE]
    return torch.stack(parts_TE).mean(0).reshape(tuple(shape))


def _substitute(blocks: nn.ModuleList, stage: Stage, armed: tuple[int, ...]) -> dict[int, int]:
    """The stage's last block, if it is armed and another stage follows -> the block to probe in its place.

    How the next stage combines the two parts is not visible here, so only a block that is followed by another block of
    this stage can be probed. The substitute has the same class.

    Raises:
        UnsupportedEngineError: the stage has no other block of that class.
    """
    last = stage.handover_block
    if last is None or last not in armed:
        return {}
    for other in reversed(stage.blocks[:-1]):
        if type(blocks[other]) is type(blocks[last]):
            return {last: other}
    raise UnsupportedEngineError(
        f"Block {last} ({type(blocks[last]).__name__}) ends a stage of the pipeline that has no other block of its "
        f"class, so it is unknown how it carries the stream. Use fewer stages. {LEAVE_OUT}."
    )


def probe_pass(
    model: nn.Module, stage: Stage, num_tokens: int, vllm_config: VllmConfig, device: torch.device
) -> torch.Tensor:
    """float32 [T, D] on the CPU: what the stage returns for T equal tokens whose attention sees only their own row."""
    with ExitStack() as stack:
        for layer in vllm_config.compilation_config.static_forward_context.values():
            if isinstance(layer, nn.Module):
                stack.enter_context(row_local(layer, num_tokens))
        return _forward(model, stage, num_tokens, vllm_config, device)


def _forward(
    model: nn.Module, stage: Stage, num_tokens: int, vllm_config: VllmConfig, device: torch.device
) -> torch.Tensor:
    input_ids = torch.ones(num_tokens, dtype=torch.int64, device=device)
    positions = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    if vllm_config.model_config.uses_mrope:
        positions = positions.expand(3, num_tokens).contiguous()
    with torch.inference_mode(), set_forward_context(None, vllm_config, num_tokens=num_tokens, skip_compiled=True):
        received = stage.noise_input(model, num_tokens, vllm_config.model_config.dtype, device)
        output = model(input_ids=input_ids, positions=positions, intermediate_tensors=received, inputs_embeds=None)
    return summed_stream(output).reshape(num_tokens, -1).float().cpu()


@contextmanager
def _forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Replace `forward` of one instance until the block ends."""
    module.forward = forward
    try:
        yield
    finally:
        module.__dict__.pop("forward", None)
