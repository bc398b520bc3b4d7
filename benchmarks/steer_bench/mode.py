"""Text for the setup of a claim: compiled or eager, runner, load, operations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from steer_bench.load import Load


def engine_of(facts: Mapping[str, Any]) -> str:
    """Text for the facts of an engine, such as `compiled, V1 (torch)`."""
    compiled = "eager" if facts["eager"] else "compiled"
    runner = "V2" if ".worker.gpu." in facts["runner"] or ".worker.cpu." in facts["runner"] else "V1"
    return f"{compiled}, {runner} ({facts['kernel']})" if "kernel" in facts else f"{compiled}, {runner}"


def mode_of(facts: Mapping[str, Any], load: Load) -> str:
    """Text for an engine with all operations armed that runs this load."""
    edits = ", ".join(f"`{op}`" for op in load.ops) or "no edits"
    return f"{engine_of(facts)}, {load.concurrency} at once, {edits}, all operations armed"
