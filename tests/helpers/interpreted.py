"""The V2 model runner on a CPU: every Triton kernel, vLLM's and ours, runs in Triton's interpreter."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any


def use_v2_runner() -> None:
    """Call before vLLM is imported. vLLM takes V2 only where it finds an active Triton backend, so one is named."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    import triton.backends

    triton.backends.backends["cpu"] = SimpleNamespace(compiler=None, driver=SimpleNamespace(is_active=lambda: True))
    _take_masks_of_any_integer()


def _take_masks_of_any_integer() -> None:
    """As Triton's compiler does. Its interpreter wants booleans; vLLM's grammar and n-gram kernels have integers."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store

    def boolean(mask: Any) -> Any:
        return TensorHandle(mask.data.astype(bool), mask.dtype)

    def masked_load(self: Any, ptrs: Any, mask: Any, *others: Any) -> Any:
        return load(self, ptrs, boolean(mask), *others)

    def masked_store(self: Any, ptrs: Any, value: Any, mask: Any, cache_policy: Any) -> Any:
        return store(self, ptrs, value, boolean(mask), cache_policy)

    InterpreterBuilder.create_masked_load = masked_load
    InterpreterBuilder.create_masked_store = masked_store
