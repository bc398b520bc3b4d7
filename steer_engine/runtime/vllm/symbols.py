"""Every vLLM symbol of the engine side that we wrap or call, for the check at start-up and the upgrade test."""

from __future__ import annotations

from steer_engine.runtime.vllm import (
    arming,
    async_llm,
    block_hash,
    engine_core,
    examining,
    fused_norm,
    input_processor,
    llm_engine,
    model_runner_v1,
    model_runner_v2,
    scheduler,
    shipping,
    stage,
    worker,
)
from steer_engine.runtime.vllm.patching import Symbol

MODULES = (
    async_llm, block_hash, engine_core, input_processor, llm_engine, model_runner_v1, model_runner_v2, scheduler,
    worker,
)  # fmt: skip
"""The modules with a `hook()` and `SYMBOLS`."""


def all_symbols() -> tuple[Symbol, ...]:
    return tuple(
        symbol for module in (*MODULES, arming, examining, fused_norm, shipping, stage) for symbol in module.SYMBOLS
    )


def vllm_version() -> str:
    """Of the vLLM that is installed."""
    from vllm import __version__

    return str(__version__)
