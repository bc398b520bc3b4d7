"""Runs prompts on plain vLLM, in a process where our plugin is not loaded, and saves what came out.

    python plain_vllm.py SETTINGS.json OUT.npz

SETTINGS: {"model", "llm": {...}, "prompts": [[...]], "params": {...}}. OUT: ids [N, M], logprobs [N, M] float64.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np

os.environ["VLLM_PLUGINS"] = ""
sys.path.insert(0, str(Path(__file__).parent))


def main() -> None:
    if os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1":
        from interpreted import use_v2_runner

        use_v2_runner()
    settings = json.loads(Path(sys.argv[1]).read_text())
    import vllm
    from driving import generate, sampled

    llm = vllm.LLM(settings["model"], **settings["llm"])
    assert not any(name == "steer_engine" or name.startswith("steer_engine.") for name in sys.modules)
    outputs = generate(llm, settings["prompts"], [None] * len(settings["prompts"]), **settings["params"])
    ids, logprobs = zip(*(sampled(output) for output in outputs), strict=True)
    np.savez(sys.argv[2], ids=np.array(ids), logprobs=np.array(logprobs, dtype=np.float64))


if __name__ == "__main__":
    main()
