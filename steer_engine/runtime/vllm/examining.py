"""What an engine would be like, asked of vLLM before it is deployed: its configuration, and a small armed copy of it.

Calls `EngineArgs.create_engine_config`, `LLMEngine.from_engine_args`, and reads why vLLM picks a model runner. Known
for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from vllm.engine.arg_utils import EngineArgs
from vllm.triton_utils import HAS_TRITON
from vllm.usage.usage_lib import UsageContext
from vllm.v1.engine.llm_engine import LLMEngine

from steer_engine.config import CONFIG_KEY, SteeringConfig
from steer_engine.runtime.allocation import Footprint, allocate_tables
from steer_engine.runtime.vllm import shipping
from steer_engine.runtime.vllm.arming import most_rows
from steer_engine.runtime.vllm.patching import Symbol
from steer_engine.runtime.vllm.supported import model_shape

if TYPE_CHECKING:
    from vllm.config import VllmConfig

SYMBOLS = (
    Symbol("vllm.engine.arg_utils:EngineArgs.create_engine_config", ("usage_context",)),
    Symbol("vllm.engine.arg_utils:EngineArgs.from_cli_args", ("args",)),
    Symbol("vllm.triton_utils:HAS_TRITON"),
    Symbol("vllm.usage.usage_lib:UsageContext"),
    Symbol("vllm.v1.engine.llm_engine:LLMEngine.from_engine_args", ("engine_args",)),
)

PROBE_SETTINGS: dict[str, Any] = {
    "load_format": "dummy",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 2,
    "max_num_batched_tokens": 256,
    "kv_cache_memory_bytes": 512 * 2**20,
    "speculative_config": None,
    "disable_log_stats": True,
}
"""The copy has random weights and room for nothing but its start; neither changes how a block carries the stream."""


def engine_args(args: argparse.Namespace) -> EngineArgs:
    """vLLM's settings of the engine, from the flags of `serve`. One rank of one replica: all are alike."""
    found = EngineArgs.from_cli_args(args)
    return dataclasses.replace(
        found,
        skip_tokenizer_init=True,
        tensor_parallel_size=1,
        data_parallel_size=1,
        distributed_executor_backend=None,
    )


def configuration(asked: EngineArgs) -> VllmConfig:
    """The whole configuration, with every default that vLLM has here. Nothing is loaded."""
    return asked.create_engine_config(UsageContext.OPENAI_API_SERVER)


def footprint(vllm_config: VllmConfig, config: SteeringConfig) -> Footprint:
    """What the buffers of one rank take, by the call that allocates them."""
    shape = model_shape(vllm_config, config)
    tables = allocate_tables(
        config,
        num_sites=len(shape.armed_blocks),
        hidden_size=shape.hidden_size,
        dtype=vllm_config.model_config.dtype,
        device="meta",
        max_requests=vllm_config.scheduler_config.max_num_seqs,
        max_tokens=most_rows(vllm_config),
        reads=config.capture != (),
    )
    return Footprint.of(tables)


def model_runner(vllm_config: VllmConfig) -> tuple[str, str]:
    """The model runner that vLLM takes on this machine, V1 or V2, and why."""
    name = "V2" if vllm_config.use_v2_model_runner else "V1"
    said = os.environ.get("VLLM_USE_V2_MODEL_RUNNER")
    if said is not None:
        return name, f"VLLM_USE_V2_MODEL_RUNNER={said}"
    if name == "V2":
        return name, "vLLM's default where Triton is usable"
    if not HAS_TRITON:
        return name, "Triton is not usable on this machine"
    unsupported: list[str] = getattr(vllm_config, "_get_v2_model_runner_unsupported_features", list)()
    return name, f"V2 does not support {', '.join(unsupported)}" if unsupported else "vLLM's choice"


def start_small(asked: EngineArgs, shrink: Callable[[Any], Any]) -> dict[str, Any]:
    """Start an armed copy in this process, with random weights and `shrink` applied to its configuration.

    Returns what its worker says of itself. Raises UnsupportedEngineError if it cannot be armed, or vLLM's own errors.
    """
    settings = dict(asked.additional_config or {})
    # A copy has fewer blocks than may be named; whatever is armed, each kind of block is asked.
    settings[CONFIG_KEY] = {**settings.get(CONFIG_KEY, {}), "blocks": "all", "capture": ()}
    overrides = asked.hf_overrides or shrink
    copy = dataclasses.replace(asked, **PROBE_SETTINGS, hf_overrides=overrides, additional_config=settings)
    engine = LLMEngine.from_engine_args(copy, usage_context=UsageContext.LLM_CLASS)
    status = shipping.check_status([shipping.call(engine, "steer_status")])
    worker: dict[str, Any] = status["workers"][0]
    return worker
