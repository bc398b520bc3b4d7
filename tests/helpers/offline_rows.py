"""Captures of the offline engine, with the settings of a test's server. Run in a process of its own.

IN: JSON {"model", "vector": file, "llm": settings, "prompts": {name: tokens}, "captures": {name: [prompt, position,
steering, after]}}. OUT: an .npz with float32 [blocks, rows, D] by name.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any


def main(source: str, target: str) -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import numpy as np

    from steer_engine import LLM
    from steer_engine.vectors import load

    with open(source) as file:
        task: dict[str, Any] = json.load(file)
    llm = LLM(task["model"], vectors={"east": load(task["vector"])}, capture=True, **task["llm"])
    np.savez(
        target,
        **{
            name: llm.capture([task["prompts"][prompt]], position, steering=steering, after=after)[0]
            for name, (prompt, position, steering, after) in task["captures"].items()
        },
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
