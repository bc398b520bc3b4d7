"""Runs the prompts of a file, steered as it says, on an engine over several workers, and saves what came out.

    python parallel_process.py SETTINGS.json OUT.json

SETTINGS: {"model", "llm": {...}, "batches": [[[tokens, spec or null], ...], ...], "params": {...}, "wrong": a digest
under which r0 is offered at the end}; r0..r31 are the vectors.
OUT: {"batches": [[[tokens, logprobs, prompt logprobs], ...], ...], "captured": [blocks, positions, D] of the first
prompt, "workers": what each says of itself at the end, "refused": the answer to the offer}.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(1, str(Path(__file__).parents[1]))


def main() -> None:
    from driving import generate, prompt_logprobs, sampled
    from engines import random_vector

    from steer_engine import LLM
    from steer_engine.runtime.vllm import shipping
    from steer_engine.vectors import safetensors_format

    settings = json.loads(Path(sys.argv[1]).read_text())
    vectors = {f"r{seed}": random_vector(seed) for seed in range(32)}
    llm = LLM(settings["model"], vectors=vectors, capture=True, **settings["llm"])
    batches: list[Any] = []
    for batch in settings["batches"]:
        prompts, specs = [prompt for prompt, _ in batch], [spec for _, spec in batch]
        outputs = generate(llm, prompts, specs, **settings["params"])
        batches.append([[*sampled(output), prompt_logprobs(output).tolist()] for output in outputs])
        llm.llm_engine.reset_prefix_cache()
    captured = llm.capture([settings["batches"][0][0][0]], position="all")[0]
    payload = safetensors_format.to_bytes(vectors["r0"])
    refused = shipping.call(llm.llm_engine, "steer_put", settings["wrong"], payload)
    workers = llm.steering_status()["workers"]
    found = {"batches": batches, "captured": captured.tolist(), "workers": workers, "refused": refused}
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
