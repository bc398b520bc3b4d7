"""The V2 model runner on a CPU: every Triton kernel, vLLM's and ours, runs in Triton's interpreter."""

from __future__ import annotations

import os
from types import SimpleNamespace


def use_v2_runner() -> None:
    """Call before vLLM is imported. vLLM takes V2 only where it finds an active Triton backend, so one is named."""
    os.environ["TRITON_INTERPRET"] = "1"
    os.environ["VLLM_USE_V2_MODEL_RUNNER"] = "1"
    import triton.backends

    triton.backends.backends["cpu"] = SimpleNamespace(compiler=None, driver=SimpleNamespace(is_active=lambda: True))
