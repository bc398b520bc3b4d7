"""Runs prompts on an engine in a process of its own and saves what came out.

    python own_process.py SETTINGS.json OUT.npz

Plain vLLM, without our plugin, unless SETTINGS["armed"]: then Steer Engine without steering, after steered requests.
SETTINGS: {"model", "llm": {...}, "prompts": [[...]], "params": {...}, "armed"}. OUT: ids and logprobs [N, M].
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))


def alone(
    folder: Path,
    model: str,
    llm: dict[str, Any],
    prompts: list[list[int]],
    params: dict[str, Any],
    *,
    armed: bool = False,
    timeout: int = 280,
) -> tuple[np.ndarray, np.ndarray]:
    """Run this file in a process. Returns tokens and logprobs [N, M]. folder: where its two files go."""
    settings = {"model": model, "llm": llm, "prompts": prompts, "params": params, "armed": armed}
    (folder / "settings.json").write_text(json.dumps(settings))
    command = [sys.executable, "-P", __file__, str(folder / "settings.json"), str(folder / "out.npz")]
    subprocess.run(command, check=True, timeout=timeout)
    saved = np.load(folder / "out.npz")
    return saved["ids"], saved["logprobs"]


def plain(settings: dict[str, Any]) -> Any:
    import vllm

    llm = vllm.LLM(settings["model"], **settings["llm"])
    assert not any(name == "steer_engine" or name.startswith("steer_engine.") for name in sys.modules)
    return llm


def armed(settings: dict[str, Any]) -> Any:
    from helpers.driving import fill_the_bank
    from helpers.engines import random_vector
    from steer_engine import LLM

    vectors = {f"r{seed}": random_vector(seed) for seed in range(32)}
    llm = LLM(settings["model"], vectors=vectors, **settings["llm"])
    fill_the_bank(llm, settings["prompts"], **settings["params"])
    return llm


def main() -> None:
    settings = json.loads(Path(sys.argv[1]).read_text())
    if not settings["armed"]:
        os.environ["VLLM_PLUGINS"] = ""
    if os.environ.get("TRITON_INTERPRET") == "1":
        from helpers.interpreted import use_v2_runner

        use_v2_runner()
    from helpers.driving import silent

    llm = (armed if settings["armed"] else plain)(settings)
    ids, logprobs = silent(llm, settings["prompts"], **settings["params"])
    np.savez(sys.argv[2], ids=ids, logprobs=logprobs)


if __name__ == "__main__":
    main()
