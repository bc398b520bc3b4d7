"""Every vLLM symbol that Steer Engine wraps or uses, for the check at startup and the check of a new vLLM.

Known for vLLM 0.32 and 0.33. An unknown vLLM fails in these checks, by symbol name, and never by serving a request
unsteered.
"""

from __future__ import annotations

from types import ModuleType

from steer_engine.vllm import (
    arming,
    blocks,
    engine_client,
    engine_core,
    fused_norm,
    intake,
    non_finite,
    probed,
    runner,
    runner_v1,
    runner_v2,
    scheduler,
    sites,
    tags,
    worker,
)
from steer_engine.vllm.patching import Symbol

ENGINE_MODULES: tuple[ModuleType, ...] = (
    intake,
    engine_core,
    scheduler,
    non_finite,
    probed,
    worker,
    runner_v1,
    runner_v2,
)
"""Patches of engines and their clients. They apply in every process that vLLM starts."""

ASYNC_LLM_INIT = Symbol("vllm.v1.engine.async_llm:AsyncLLM.__init__", ("vllm_config",))


def api_modules() -> tuple[ModuleType, ...]:
    """Patches of the API server. They apply in processes that make an `AsyncLLM`; others need not import them."""
    from steer_engine.vllm import check_model, reports, shutdown

    return check_model, reports, shutdown


def wrapped() -> tuple[Symbol, ...]:
    """Every symbol that is replaced."""
    patches = [patch for module in (*ENGINE_MODULES, *api_modules()) for patch in module.PATCHES]
    return (ASYNC_LLM_INIT, *(patch.symbol for patch in patches))


def engine_symbols() -> tuple[Symbol, ...]:
    """What every process needs."""
    used = [module.USED for module in (*ENGINE_MODULES, arming, blocks, sites, fused_norm, engine_client, runner, tags)]
    patched = [patch.symbol for module in ENGINE_MODULES for patch in module.PATCHES]
    return (*patched, *(symbol for symbols in used for symbol in symbols))


def api_symbols() -> tuple[Symbol, ...]:
    """What a process that serves needs as well."""
    from steer_engine.vllm import telling

    patched = [patch.symbol for module in api_modules() for patch in module.PATCHES]
    used = [module.USED for module in (*api_modules(), telling)]
    return (ASYNC_LLM_INIT, *patched, *(symbol for symbols in used for symbol in symbols))


def vllm_version() -> str:
    """The version of the installed vLLM."""
    from vllm import __version__

    return str(__version__)
