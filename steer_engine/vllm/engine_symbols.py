"""Every vLLM symbol of the engine side that we wrap or call, for the check at start-up and the upgrade test."""

from __future__ import annotations

from steer_engine.vllm import (
    arming,
    blocks,
    engine_client,
    engine_core,
    examination,
    fused_norm,
    intake,
    runner_v1,
    runner_v2,
    scheduler,
    worker,
)
from steer_engine.vllm.patching import Symbol

MODULES = (
    intake, engine_core, runner_v1, runner_v2, scheduler, worker,
)  # fmt: skip
"""The modules with a `hook()` and `SYMBOLS`."""


def all_symbols() -> tuple[Symbol, ...]:
    return tuple(
        symbol
        for module in (*MODULES, arming, examination, fused_norm, engine_client, blocks)
        for symbol in module.SYMBOLS
    )


def vllm_version() -> str:
    """Of the vLLM that is installed."""
    from vllm import __version__

    return str(__version__)
