"""Prefix-cache identity: what is applied inside a KV block becomes part of the block's key.

Wraps `vllm.v1.core.kv_cache_utils.generate_block_hash_extra_keys`, also where it was imported by name. KV events keep
their format: `to_event_extra_keys` publishes known tags only. Known for vLLM 0.32 and 0.33.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from steer_engine.runtime.identity import block_key
from steer_engine.runtime.vllm.patching import Symbol, wrap

_NAME = "generate_block_hash_extra_keys"
EXTRA_KEYS = Symbol(f"vllm.v1.core.kv_cache_utils:{_NAME}", ("request", "start_token_idx", "end_token_idx"))
IMPORTED = (Symbol(f"vllm.v1.core.block_pool:{_NAME}"), Symbol(f"vllm.v1.simple_kv_offload.manager:{_NAME}"))
SYMBOLS = (EXTRA_KEYS, *IMPORTED)


def hook() -> None:
    for symbol in SYMBOLS:
        wrap(symbol, _with_steering)


def _with_steering(original: Callable[..., Any]) -> Callable[..., Any]:
    def generate_block_hash_extra_keys(
        request: Any, start_token_idx: int, end_token_idx: int, start_mm_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[tuple[Any, ...] | None, int]:
        keys, next_mm_idx = original(request, start_token_idx, end_token_idx, start_mm_idx, *args, **kwargs)
        if request.sampling_params is not None:
            key = block_key(request.sampling_params.extra_args, start_token_idx, end_token_idx)
            if key is not None:
                keys = (*(keys or ()), key)
        return keys, next_mm_idx

    return generate_block_hash_extra_keys
