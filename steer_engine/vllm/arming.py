"""Arms one worker: probes the model, allocates the buffers, and puts the op behind every armed block.

Runs right after the model is loaded: before the first profile run, so that the op is part of the compiled graph, and
before vLLM sizes its KV cache, so that the buffers are counted.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

from vllm.config import CUDAGraphMode
from vllm.forward_context import get_forward_context

from steer_engine.engine import op
from steer_engine.engine.runtime import EngineRuntime
from steer_engine.engine.site_calls import SiteCalls
from steer_engine.engine.stream import ProbeRows, StreamForm
from steer_engine.settings import CONFIG_KEY, SteeringConfig
from steer_engine.site import site_of
from steer_engine.vllm.blocks import Stage, find_blocks, probe_forms
from steer_engine.vllm.fused_norm import fuse, reason_not_to_fuse
from steer_engine.vllm.patching import Symbol
from steer_engine.vllm.sites import SiteModule, find_site_modules, main_tensor, with_main_tensor
from steer_engine.vllm.supported import check_supported

if TYPE_CHECKING:
    from vllm.config import VllmConfig


M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of mallopt, from <malloc.h>."""

KEPT_BYTES = 2**31 - 1
"""Free memory kept at the end of the heap: mallopt's maximum."""
MAPPED_BYTES = 2**25
"""Larger blocks are mapped, and unmapped when freed: glibc's maximum."""


def keep_freed_memory() -> bool:
    """Tell the C library to keep the freed memory of a step for the next one. Returns whether it does.

    An armed model's compiled graph needs more buffers than a plain one, since the stream is written to memory after
    every armed block. By default glibc returns freed memory at the end of its heap to the system and fetches it again
    page by page, which costs 4 % of a step with 128 requests on a CPU. Nothing changes where the environment sets
    glibc's thresholds, or the C library has none; with a preloaded allocator the setting has no effect.
    """
    if any(name in os.environ for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    # Once one threshold is set, glibc no longer adapts the other by itself.
    return bool(mallopt(M_TRIM_THRESHOLD, KEPT_BYTES)) and bool(mallopt(M_MMAP_THRESHOLD, MAPPED_BYTES))


SET_ADAPTERS = Symbol(
    "vllm.v1.worker.lora_model_runner_mixin:LoRAModelRunnerMixin._set_active_loras",
    ("prompt_lora_mapping", "token_lora_mapping", "lora_requests"),
)
USED = (
    SET_ADAPTERS,
    Symbol("vllm.config:CUDAGraphMode"),
    Symbol("vllm.forward_context:get_forward_context"),
    Symbol("vllm.forward_context:set_forward_context", ("attn_metadata", "num_tokens", "skip_compiled")),
)

logger = logging.getLogger(__name__)


def arm(runner: Any) -> EngineRuntime | None:
    """Arm the model that a runner has just loaded. None where the engine is not armed.

    The runtime is kept in `static_forward_context`, where vLLM's own attention op finds its layers: one per engine, so
    that several engines in a process do not share state.
    """
    vllm_config: VllmConfig = runner.vllm_config
    config = SteeringConfig.from_additional_config(vllm_config.additional_config)
    if config is None:
        return None
    check_supported(vllm_config)
    num_blocks = vllm_config.model_config.get_total_num_hidden_layers()
    blocks = find_blocks(runner.model, num_blocks)
    stage = Stage.of(blocks)
    requested = config.armed_blocks(num_blocks)
    armed = stage.among(requested)
    if vllm_config.lora_config is not None:
        # No adapter on any row of the probe: vLLM's mapping is uninitialised before the first step.
        none = (0,) * ProbeRows(num_blocks=num_blocks).num_rows
        runner._set_active_loras(none, none, set())
    forms, norms = probe_forms(runner.model, blocks, armed, vllm_config, runner.device)
    site_modules = find_site_modules(runner.model, blocks, forms, config.sites, vllm_config, runner.device)
    runtime = EngineRuntime(
        config=config,
        forms=forms,
        capture_blocks=stage.among(config.capture_blocks(num_blocks)),
        hidden_size=vllm_config.model_config.get_hidden_size(),
        dtype=vllm_config.model_config.dtype,
        device=runner.device,
        max_requests=vllm_config.scheduler_config.max_num_seqs,
        max_tokens=most_rows(vllm_config),
        num_drafts=num_drafts(vllm_config),
        use_triton=vllm_config.use_v2_model_runner or runner.device.type != "cpu",
        elsewhere=tuple(block for block in requested if block not in armed),
    )
    fused = norms if _fuses(config, runtime, vllm_config) else {}
    for site, block in enumerate(armed):
        if block in fused:
            fuse(fused[block], site)
        else:
            blocks[block].forward = _edited(blocks[block].forward, forms[block], site)
    for point, part in site_modules.items():
        part.module.forward = _edited_part(part, runtime.points.index(point))
        names = runtime.site_modules.setdefault(site_of(point).value, [])
        names += [part.name] if part.name not in names else []
    runtime.fused_blocks = tuple(sorted(fused))
    runtime.stage_blocks = stage.blocks
    replays = vllm_config.compilation_config.cudagraph_mode != CUDAGraphMode.NONE and runner.device.type != "cpu"
    runtime.count_calls(SiteCalls(runtime.points, can_replay=replays))
    vllm_config.compilation_config.static_forward_context[CONFIG_KEY] = runtime
    if runner.device.type == "cpu":
        keep_freed_memory()
    if vllm_config.parallel_config.pipeline_parallel_size > 1:
        logger.warning("Steering with pipeline parallelism has been tested on processors only, not on GPUs.")
    logger.info(
        "Steering is armed: %d of %d blocks (%s)%s, operations %s, bank and tables %.1f MiB.",
        len(armed), num_blocks, ", ".join(sorted({form.value for form in forms.values()})),
        "".join(f", {site} ({', '.join(names)})" for site, names in runtime.site_modules.items()),
        ", ".join(config.ops), runtime.num_bytes / 2**20,
    )  # fmt: skip
    return runtime


def _fuses(config: SteeringConfig, runtime: EngineRuntime, vllm_config: VllmConfig) -> bool:
    if not config.fuse_norm:
        return False
    reason = reason_not_to_fuse(vllm_config)
    if reason is None and not runtime.use_triton:
        reason = "there is no Triton on this device"
    if reason is not None:
        logger.warning("Edits are not fused with the norms that follow: %s.", reason)
    return reason is None


def runtime_of(runner: Any) -> EngineRuntime | None:
    """The runtime of a runner's engine, or None where it is not armed."""
    context = runner.vllm_config.compilation_config.static_forward_context
    return cast("EngineRuntime | None", context.get(CONFIG_KEY))


def _running() -> EngineRuntime:
    return cast(EngineRuntime, get_forward_context().no_compile_layers[CONFIG_KEY])


op.bind(_running)


def most_rows(vllm_config: VllmConfig) -> int:
    """Token rows of the largest batch, padding included."""
    captured = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
    return int(max(vllm_config.scheduler_config.max_num_batched_tokens, *captured)) + 1


def num_drafts(vllm_config: VllmConfig) -> int:
    """Draft tokens of a request in one step, at most."""
    speculative = vllm_config.speculative_config
    return 0 if speculative is None else int(speculative.num_speculative_tokens or 0)


def _edited(original: Callable[..., Any], form: StreamForm, site: int) -> Callable[..., Any]:
    """`original` followed by the op. No data-dependent Python: Dynamo traces it."""
    if form is StreamForm.SPLIT:

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            op.edit_residual(output[0], output[1], site)
            return output

    else:

        def forward(*args: Any, **kwargs: Any) -> Any:
            output = original(*args, **kwargs)
            op.edit_residual(None, output[0] if isinstance(output, tuple) else output, site)
            return output

    return forward


def _edited_part(part: SiteModule, site: int) -> Callable[..., Any]:
    """The module's `forward` followed by the op on its output, which is not yet a part of the stream."""
    original, copies = part.module.forward, part.copies

    def forward(*args: Any, **kwargs: Any) -> Any:
        output = original(*args, **kwargs)
        tensor = main_tensor(output)
        assert tensor is not None
        if copies:
            tensor = tensor.clone()
            output = with_main_tensor(output, tensor)
        op.edit_residual(None, tensor, site)
        return output

    return forward
