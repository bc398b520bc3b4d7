"""Runs the prompts of a file, steered as it says, on an engine over several workers, and saves what came out.

    python parallel_process.py SETTINGS.json OUT.json

SETTINGS: {"model", "num_blocks", "llm": {...}, "batches": [[[tokens, spec or null], ...], ...], "params": {...},
"probed": [[tokens, spec], ...], "wrong": a digest under which r0 is offered at the end}; r0..r31 are the vectors.
OUT: {"batches": [[[tokens, logprobs, prompt logprobs], ...], ...], "probed": [[tokens, what is told], ...],
"captured": [blocks, positions, D] of the first prompt, "workers": what each says of itself at the end, "refused": the
answer to the offer}.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))


def let_stages_run_on_a_processor() -> None:
    """vLLM's V1 runner makes the buffer that a stage receives into in a dummy run, and has none on a CPU (0.32)."""
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    original = GPUModelRunner.sync_and_gather_intermediate_tensors

    def sync(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.intermediate_tensors is None:
            self.intermediate_tensors = self.model.make_empty_intermediate_tensors(
                self.max_num_tokens, self.dtype, self.device
            )
        return original(self, *args, **kwargs)

    GPUModelRunner.sync_and_gather_intermediate_tensors = sync


# Here and not in `main`: the workers import this file too.
if os.environ.get("STEER_TEST_DEVICE") == "gpu":
    pass
elif os.environ.get("STEER_TEST_RUNNER") == "v2":
    from helpers.interpreted import use_v2_runner

    use_v2_runner()
elif "pipeline_parallel_size" in Path(sys.argv[1]).read_text():
    let_stages_run_on_a_processor()


def main() -> None:
    from helpers.driving import generate, prompt_logprobs, sampled
    from helpers.engines import random_vector
    from steer_engine import LLM
    from steer_engine.settings import SteeringConfig
    from steer_engine.site import SITES_IN_BLOCKS
    from steer_engine.vectors import safetensors_format
    from steer_engine.vllm import engine_client

    settings = json.loads(Path(sys.argv[1]).read_text())
    vectors = {f"r{seed}": random_vector(seed, num_blocks=settings["num_blocks"]) for seed in range(32)}
    steering = SteeringConfig(sites=SITES_IN_BLOCKS)
    llm = LLM(settings["model"], vectors=vectors, capture=True, steering=steering, **settings["llm"])
    batches: list[Any] = []
    for batch in settings["batches"]:
        prompts, specs = [prompt for prompt, _ in batch], [spec for _, spec in batch]
        outputs = generate(llm, prompts, specs, **settings["params"])
        batches.append([[*sampled(output), prompt_logprobs(output).tolist()] for output in outputs])
        llm.llm_engine.reset_prefix_cache()
    prompts, specs = [prompt for prompt, _ in settings["probed"]], [spec for _, spec in settings["probed"]]
    choices = [
        output.outputs[0] for output in generate(llm, prompts, specs, max_tokens=settings["params"]["max_tokens"])
    ]
    probed = [[list(choice.token_ids), getattr(choice, "steering", None)] for choice in choices]
    captured = llm.capture([settings["batches"][0][0][0]], position="all")[0]
    payload = safetensors_format.to_bytes(vectors["r0"])
    refused = engine_client.call(llm.llm_engine, "put", settings["wrong"], payload)
    workers = llm.steering_status()["workers"]
    found = {
        "batches": batches,
        "probed": probed,
        "captured": captured.tolist(),
        "workers": workers,
        "refused": refused,
    }
    Path(sys.argv[2]).write_text(json.dumps(found))


if __name__ == "__main__":
    main()
