"""Our log lines beside vLLM's, in its format and at its level: vLLM configures its own logger only."""

from __future__ import annotations

import logging


def log_with_vllm() -> None:
    """Hang the logger `steer_engine` below `vllm`, so that whatever vLLM sets up later holds for both."""
    logging.getLogger("steer_engine").parent = logging.getLogger("vllm")
