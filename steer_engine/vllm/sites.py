"""The sites inside blocks: which module's output is the attention's or the MLP's contribution to the stream.

Found and examined at startup, by small forward passes with made-up attention (see `blocks.row_local`). The first one
shows which modules run, two others whether noise of two sizes in their outputs arrives in the stream in its direction,
and in proportion. With tensor parallelism, each rank must have the whole output, not its share. Uses
`tensor_model_parallel_all_reduce` of vLLM 0.32 and 0.33.

Shape suffixes: T rows of the probe, P points, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from vllm.distributed.communication_op import tensor_model_parallel_all_reduce

from steer_engine.engine.stream import ProbeRows, StreamForm, noise_beside
from steer_engine.errors import UnsupportedEngineError
from steer_engine.fields import block_ranges
from steer_engine.site import SITES_IN_BLOCKS, Site, block_of, points_at, site_of
from steer_engine.vllm.blocks import Stage, probe_pass
from steer_engine.vllm.patching import Symbol

if TYPE_CHECKING:
    from vllm.config import VllmConfig


USED = (Symbol("vllm.distributed.communication_op:tensor_model_parallel_all_reduce", ("input_",)),)

WORDS = {
    Site.ATTN: ("attn", "attention"),
    Site.MLP: ("mlp", "feed_forward", "feedforward", "ffn", "moe", "expert"),
}
"""Parts of the names that modules of a block have. Norms and modules without weights are no candidates."""

NOT_WORDS = ("norm", "linear_attn", "cross", "encoder")

NOUNS = {Site.ATTN: "attention", Site.MLP: "MLP"}

REMEDY = "Leave it out of --steering-sites, or these blocks out of --steering-blocks."

NOISES = (4.0, 16.0)
"""Sizes of the noise, in sizes of the stream: the rest of the block then changes its output by far less."""
MIN_COSINE = 0.7
"""Of the noise and what arrives in the stream. Another projection on the way leaves about 1 / sqrt(D)."""
MIN_SHARE, MAX_SHARE = 0.5, 2.0
"""What arrives of the noise between the two sizes, in shares of what arrives of the larger one. A constant factor on
the way (Granite) leaves 1, a norm almost 0."""


class Effect(NamedTuple):
    """Noise in an output, and how it changed the stream: float32 [D]."""

    noise_D: torch.Tensor
    change_D: torch.Tensor

    @property
    def cosine(self) -> float:
        return float(torch.cosine_similarity(self.change_D, self.noise_D, dim=0))

    @property
    def gain(self) -> float:
        """The part of the noise that arrives."""
        return float(self.change_D @ self.noise_D / self.noise_D.square().sum())


@dataclass(eq=False)
class SiteModule:
    """The module whose output is edited at one point.

    copies: its output shares memory with its input, which others may read: the edit is made in a copy.
    """

    module: nn.Module
    name: str
    copies: bool = False
    num_calls: int = 0
    output: torch.Tensor | None = field(default=None, repr=False)
    """What it returned in the first pass."""
    row_D: torch.Tensor | None = field(default=None, repr=False)
    """A copy of row 0 of it, to tell whether the output was changed in place."""

    def saw(self, module: nn.Module, name: str, inputs: Iterable[torch.Tensor], output: Any) -> None:
        """In the first pass, `module` has returned `output`: the site is there, as far as we know."""
        self.module, self.name, self.output = module, name, main_tensor(output)
        self.row_D = None if self.output is None else self.output[..., 0, :].clone()
        memory = None if self.output is None else self.output.untyped_storage().data_ptr()
        self.copies = any(each.untyped_storage().data_ptr() == memory for each in inputs)

    def is_only_input(self, inputs: list[torch.Tensor]) -> bool:
        """Whether a module gets our output, unchanged, and no other tensor."""
        if len(inputs) != 1 or inputs[0] is not self.output or self.row_D is None:
            return False
        return torch.equal(inputs[0][..., 0, :], self.row_D)


def main_tensor(output: Any) -> torch.Tensor | None:
    """The tensor, or the first part of a tuple that begins with one."""
    first = output[0] if isinstance(output, tuple) and output else output
    return first if isinstance(first, torch.Tensor) else None


def with_main_tensor(output: Any, tensor: torch.Tensor) -> Any:
    """`output` with `tensor` in place of its main tensor."""
    return (tensor, *output[1:]) if isinstance(output, tuple) else tensor


def find_site_modules(
    model: nn.Module,
    blocks: nn.ModuleList,
    forms: Mapping[int, StreamForm],
    sites: Iterable[Site],
    vllm_config: VllmConfig,
    device: torch.device,
) -> dict[int, SiteModule]:
    """The module of each point of the blocks in `forms`, which belong to this worker, at `sites`.

    If a norm of the block gets the module's output and nothing else (Gemma, OLMo 2), the norm's output is what is added
    to the stream: the site is there.

    Raises:
        UnsupportedEngineError: a block has no such module or several, it does not run exactly once, or its output is
            not added to the stream. The message names the block and its class.
    """
    found = {point: _candidate(blocks, forms, site, point) for site in sites for point in points_at(forms, site)}
    if not found:
        return {}
    rows = ProbeRows(num_blocks=len(blocks))
    stage = Stage.of(blocks)
    streams = _watch_pass(model, blocks, forms, found, rows, stage, vllm_config, device)
    for point, site_module in found.items():
        _check_runs(point, blocks, site_module, rows, vllm_config.model_config.get_hidden_size())
    _check_whole(blocks, found, vllm_config)
    small, large = (
        _noise_pass(model, blocks, forms, found, streams, rows, stage, vllm_config, device, size) for size in NOISES
    )
    for point, site_module in found.items():
        cosine, share = _arrived(small.get(point), large.get(point))
        if not cosine > MIN_COSINE:
            raise _refusal(
                point,
                blocks,
                f"the output of {site_module.name} is not added to the residual stream as it is (noise in it and the "
                f"stream's change have a cosine of {cosine:.2f})",
            )
        if not MIN_SHARE < share < MAX_SHARE:
            raise _refusal(
                point,
                blocks,
                f"the output of {site_module.name} is not added to the residual stream in proportion to its size, as "
                f"behind a norm (of more noise, {share:.0%} of the share of less arrives)",
            )
        site_module.output = site_module.row_D = None
    return found


def _candidate(blocks: nn.ModuleList, forms: Mapping[int, StreamForm], site: Site, point: int) -> SiteModule:
    """The one child of the point's block whose name says that it is the attention or the MLP."""
    named = _named(blocks[block_of(point)], site)
    if len(named) == 1:
        name, module = next(iter(named.items()))
        return SiteModule(module, name)
    if named:
        raise _refusal(point, blocks, f"its MLP or attention has several parts: {', '.join(named)}")
    without = [block for block in forms if not _named(blocks[block], site)]
    raise UnsupportedEngineError(
        f"Site {site.value!r} does not exist in every armed block: block{'s' if len(without) > 1 else ''} "
        f"{block_ranges(without)} ({type(blocks[without[0]]).__name__}) "
        f"{'have' if len(without) > 1 else 'has'} no {NOUNS[site]} in a module of its own. {REMEDY}"
    )


def _named(block: nn.Module, site: Site) -> dict[str, nn.Module]:
    """The children of a block with a name for the site, each module once."""
    found: dict[int, tuple[str, nn.Module]] = {}
    for name, child in block.named_children():
        lower = name.lower()
        if not any(word in lower for word in WORDS[site]) or any(word in lower for word in NOT_WORDS):
            continue
        if next(child.parameters(), None) is not None and not _is_norm(child):
            found.setdefault(id(child), (name, child))
    return dict(found.values())


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _refusal(point: int, blocks: nn.ModuleList, reason: str) -> UnsupportedEngineError:
    block, site = block_of(point), site_of(point)
    return UnsupportedEngineError(
        f"Site {site.value!r} cannot be armed in block {block} ({type(blocks[block]).__name__}): {reason}. {REMEDY}"
    )


def _check_runs(point: int, blocks: nn.ModuleList, found: SiteModule, rows: ProbeRows, hidden_size: int) -> None:
    if found.num_calls != 1:
        raise _refusal(point, blocks, f"its {found.name} runs {found.num_calls} times in one forward pass")
    output = found.output
    if output is None or output.shape[-2:] != (rows.num_rows, hidden_size):
        shape = "no tensor" if output is None else f"a tensor of shape {list(output.shape)}"
        raise _refusal(point, blocks, f"its {found.name} returns {shape}, not a row of {hidden_size} for each token")


def _check_whole(blocks: nn.ModuleList, found: Mapping[int, SiteModule], vllm_config: VllmConfig) -> None:
    """With tensor parallelism, an output that is only a rank's share of a sum would get every edit several times."""
    num_ranks = vllm_config.parallel_config.tensor_parallel_size
    if num_ranks == 1:
        return
    for point, each in found.items():
        # vLLM sets this after the model is built, for a sum that a later kernel makes. The passes here may not show it.
        experts = blocks[block_of(point)].modules() if site_of(point) is Site.MLP else ()
        if any(getattr(getattr(part, "moe_config", None), "skip_final_all_reduce", False) for part in experts):
            reason = (
                f"the experts of {each.name} are summed over the ranks of tensor parallelism only after they are added"
            )
            raise _refusal(point, blocks, reason)
    rows_PD = torch.stack([each.row_D.reshape(-1).float() for each in found.values() if each.row_D is not None])
    means_PD = tensor_model_parallel_all_reduce(rows_PD.clone()) / num_ranks
    differ_P = (means_PD - rows_PD).norm(dim=1) > 1e-2 * rows_PD.norm(dim=1)
    for (point, each), differs in zip(found.items(), differ_P.tolist(), strict=True):
        if differs:
            reason = f"the output of {each.name} is summed over the ranks of tensor parallelism only after it is added"
            raise _refusal(point, blocks, reason)


def _watch_pass(
    model: nn.Module,
    blocks: nn.ModuleList,
    forms: Mapping[int, StreamForm],
    found: Mapping[int, SiteModule],
    rows: ProbeRows,
    stage: Stage,
    vllm_config: VllmConfig,
    device: torch.device,
) -> dict[int, torch.Tensor]:
    """Fill in what each module does, and move sites behind their norms. Returns row 0 of each block's stream [D]."""
    streams: dict[int, torch.Tensor] = {}

    def of_module(each: SiteModule) -> Callable[..., None]:
        name = each.name

        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            each.num_calls += 1
            each.saw(module, name, _tensors(args, kwargs), output)

        return hook

    def of_norm(name: str, parts: list[SiteModule]) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            inputs = _tensors(args, kwargs)
            for each in parts:
                if each.is_only_input(inputs):
                    each.saw(module, f"{each.name} and {name}", inputs, output)

        return hook

    def of_block(block: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            streams[block] = _stream(output, forms[block])[0]

        return hook

    with ExitStack() as stack:
        for each in found.values():
            _hook(stack, each.module, of_module(each))
        for block in forms:
            parts = [each for point, each in found.items() if block_of(point) == block]
            for name, module in blocks[block].named_modules():
                if _is_norm(module):
                    _hook(stack, module, of_norm(name, parts))
            _hook(stack, blocks[block], of_block(block))
        probe_pass(model, stage, rows.num_rows, vllm_config, device)
    return streams


def _arrived(small: Effect | None, large: Effect | None) -> tuple[float, float]:
    """The cosine of the large noise and its effect; and how much of the difference of both noises arrives, in shares of
    what arrives of the large one. NaN where a module or block did not run."""
    if small is None or large is None:
        return math.nan, math.nan
    more = Effect(large.noise_D - small.noise_D, large.change_D - small.change_D)
    return large.cosine, more.gain / large.gain


def _noise_pass(
    model: nn.Module,
    blocks: nn.ModuleList,
    forms: Mapping[int, StreamForm],
    found: Mapping[int, SiteModule],
    streams: Mapping[int, torch.Tensor],
    rows: ProbeRows,
    stage: Stage,
    vllm_config: VllmConfig,
    device: torch.device,
    size: float,
) -> dict[int, Effect]:
    """By point, noise in the module's output, in a row of its own, and what it does to the stream.

    size: of the noise, in sizes of the stream.
    """
    generator = torch.Generator().manual_seed(2)
    noise_D = torch.randn(vllm_config.model_config.get_hidden_size(), generator=generator).to(device)
    added: dict[int, torch.Tensor] = {}
    arrived: dict[int, Effect] = {}

    def row_of(point: int) -> int:
        return rows.row(block_of(point), SITES_IN_BLOCKS.index(site_of(point)))

    def of_module(point: int) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            tensor = main_tensor(output)
            if tensor is None or block_of(point) not in streams:
                return None
            tensor = tensor.clone()
            clean_D = tensor[..., 0, :].clone()
            size_D = noise_beside(noise_D, [clean_D, streams[block_of(point)].to(tensor.dtype)], size)
            tensor[..., row_of(point), :] = clean_D + size_D.to(tensor.dtype)
            added[point] = (tensor[..., row_of(point), :].float() - clean_D.float()).reshape(-1)
            return with_main_tensor(output, tensor)

        return hook

    def of_block(block: int) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            stream_TD = _stream(output, forms[block])
            for point, noise in added.items():
                if block_of(point) == block:
                    change_D = stream_TD[row_of(point)] - stream_TD[0]
                    arrived[point] = Effect(noise, change_D)

        return hook

    with ExitStack() as stack:
        for point, each in found.items():
            _hook(stack, each.module, of_module(point))
        for block in forms:
            _hook(stack, blocks[block], of_block(block))
        probe_pass(model, stage, rows.num_rows, vllm_config, device)
    return arrived


def _stream(output: Any, form: StreamForm) -> torch.Tensor:
    """float32 [T, D]: the stream that a block returns."""
    parts = output[:2] if form is StreamForm.SPLIT else [main_tensor(output)]
    stream = torch.stack([part.float() for part in parts if part is not None]).sum(0)
    return stream.reshape(stream.shape[-2:])


def _tensors(args: Any, kwargs: Any) -> list[torch.Tensor]:
    return [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]


def _hook(stack: ExitStack, module: nn.Module, hook: Callable[..., Any]) -> None:
    stack.callback(module.register_forward_hook(hook, with_kwargs=True).remove)
