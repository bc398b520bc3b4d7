"""Which engine configurations can be armed, and the shape of their model. Wraps nothing.

A setting that is not known to be exact is refused at startup, with the reason.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from steer_engine.errors import UnsupportedEngineError
from steer_engine.model_shape import ModelShape
from steer_engine.settings import SteeringConfig

if TYPE_CHECKING:
    from vllm.config import VllmConfig


def check_supported(vllm_config: VllmConfig) -> None:
    """Raise UnsupportedEngineError if a setting adds token rows that the scheduler does not plan, or loses state."""
    parallel = vllm_config.parallel_config
    model = vllm_config.model_config
    refused = {
        "VLLM_USE_RUST_FRONTEND=1 (it bypasses Python plugins)": os.environ.get("VLLM_USE_RUST_FRONTEND") == "1",
        "micro-batching (--enable-dbo, --ubatch-size)": getattr(parallel, "use_ubatching", False)
        or getattr(parallel, "enable_dbo", False),
        "sequence-parallel MoE": bool(getattr(parallel, "use_sequence_parallel_moe", False)),
        "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
        "--monokernel (one kernel runs in place of a block)": bool(
            getattr(vllm_config.kernel_config, "monokernel", False)
        ),
        "elastic expert parallelism": bool(getattr(parallel, "enable_elastic_ep", False)),
        "kv_sharing_fast_prefill": bool(vllm_config.cache_config.kv_sharing_fast_prefill),
        "sleep mode (--enable-sleep-mode)": bool(getattr(model, "enable_sleep_mode", False)),
        f"a KV connector ({_connector(vllm_config)}; --kv-transfer-config, --kv-offloading-size): its keys do not name "
        "the steering": vllm_config.kv_transfer_config is not None,
        "breakable CUDA graphs, which have not been tested with edits (set VLLM_USE_BREAKABLE_CUDAGRAPH=0)": (
            os.environ.get("VLLM_USE_BREAKABLE_CUDAGRAPH") == "1"
            and vllm_config.compilation_config.cudagraph_mode.has_piecewise_cudagraphs()
        ),
        f"runner type {model.runner_type!r}": model.runner_type != "generate",
        "an encoder-decoder model": bool(model.is_encoder_decoder),
        "float16 with DeepSeek models (their stream is scaled there); use bfloat16": (
            "deepseek" in str(model.hf_text_config.model_type) and str(model.dtype) == "torch.float16"
        ),
    }
    found = [what for what, applies in refused.items() if applies]
    if found:
        raise UnsupportedEngineError(
            f"An engine with {'; '.join(found)} cannot be armed for steering yet. Change the setting, or start it "
            "without steering."
        )


def _connector(vllm_config: VllmConfig) -> str:
    return str(getattr(vllm_config.kv_transfer_config, "kv_connector", None))


PROMPT_LOGPROBS = (
    "prompt_logprobs (or echo with logprobs) cannot be requested from an engine on a CPU with --enable-lora: in vLLM, "
    "two such requests end the engine."
)


def refuses_prompt_logprobs(vllm_config: VllmConfig) -> bool:
    """Whether requests with `prompt_logprobs` are refused, because vLLM's adapters on a CPU take one row a request."""
    return vllm_config.lora_config is not None and vllm_config.device_config.device_type == "cpu"


def model_shape(vllm_config: VllmConfig, config: SteeringConfig) -> ModelShape:
    """The model's shape and what is armed, from the configuration alone. Requests are checked against it."""
    model = vllm_config.model_config
    num_blocks = model.get_total_num_hidden_layers()
    return ModelShape(
        hidden_size=model.get_hidden_size(),
        num_blocks=num_blocks,
        armed_blocks=config.armed_blocks(num_blocks),
        ops=config.ops,
        rows=config.rows,
        dtype=str(model.dtype).removeprefix("torch."),
        bank_rows=config.bank_rows,
        sites=config.sites,
        capture_blocks=config.capture_blocks(num_blocks),
        is_pipeline=vllm_config.parallel_config.pipeline_parallel_size > 1,
        deals_rows_on_device=bool(getattr(vllm_config.speculative_config, "enable_adaptive_verification", False)),
    )
