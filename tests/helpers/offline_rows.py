"""Captures of the offline engine, with the settings of a test's server. Run in a process of its own.

IN: JSON {"model", "vector": file, "llm": settings, "prompts": {name: tokens}, "captures": {name: [prompt, position,
steering, after]}, "answers": {name: [prompt, position, steering, scope]}, "max_tokens": of these}. OUT: an .npz with
float32 [blocks, rows, D] by name.
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
    from steer_engine.llm import SamplingParams
    from steer_engine.vectors import load

    with open(source) as file:
        task: dict[str, Any] = json.load(file)
    llm = LLM(task["model"], vectors={"east": load(task["vector"])}, capture=True, **task["llm"])
    rows = {
        name: llm.capture([task["prompts"][prompt]], position, steering=steering, after=after)[0]
        for name, (prompt, position, steering, after) in task["captures"].items()
    }
    for name, (prompt, position, steering, scope) in task["answers"].items():
        params = SamplingParams(
            max_tokens=task["max_tokens"], temperature=0, ignore_eos=True, extra_args={"steering": steering}
        )
        output = llm.capture_answers([task["prompts"][prompt]], params, scope=scope, position=position)[0]
        rows[name] = output.captured
    np.savez(target, **rows)


if __name__ == "__main__":
    main(*sys.argv[1:])
