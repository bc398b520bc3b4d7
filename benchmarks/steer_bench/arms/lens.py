"""vllm-lens 1.3.0: forward hooks on plain vLLM, with a `SteeringVector` for all blocks in every steered request.

Offline steering needs its patched `LLM.generate`, which sends the vectors of all requests to the worker before the
first request runs. So a load is one call, `concurrency` limits the scheduler, and token times are not available.
"""

from __future__ import annotations

import time
from importlib.metadata import version
from typing import Any

from steer_bench.arms.drive import mean_logprob
from steer_bench.arms.stock import engine_facts, sampling
from steer_bench.load import Load, Steering, vector
from steer_bench.settings import Settings
from steer_bench.timing import Timing

ENVIRONMENT = {"VLLM_PLUGINS": "activations"}
ADD_SCALE = 8.0


def load(settings: Settings) -> Lens:
    from vllm import LLM

    return Lens(LLM(settings.model, **settings.engine_args()), settings.num_vectors)


class Lens:
    """A `vllm.LLM` with the vllm-lens plugin."""

    def __init__(self, llm: Any, num_vectors: int) -> None:
        import torch
        from vllm_lens import SteeringVector  # type: ignore[import-not-found]

        self.llm = llm
        self.engine = llm.llm_engine
        self.model_config = self.engine.vllm_config.model_config
        config = self.model_config.hf_text_config
        size = (config.num_hidden_layers, config.hidden_size)
        self.vectors = [
            SteeringVector(
                activations=torch.from_numpy(vector(number, *size)),
                layer_indices=list(range(config.num_hidden_layers)),
                scale=ADD_SCALE,
            )
            for number in range(num_vectors)
        ]

    def describe(self) -> dict[str, Any]:
        import torch

        return {
            "vllm_lens": version("vllm-lens"),
            "outside_supported": "requires Python >= 3.12 and vllm 0.30.0",
            "num_blocks": len(self.vectors[0].layer_indices),
            "threads": torch.get_num_threads(),
            **engine_facts(self.engine),
        }

    def command(self, what: str, **arguments: Any) -> Any:
        if what == "reset_prefix_cache":
            return self.engine.reset_prefix_cache()
        raise ValueError(f"This arm has no command {what!r}.")

    def run(self, load: Load, *, check: bool = False) -> Timing:
        """check: also log-probabilities of the prompts, and the output tokens.

        TTFT and ITL are not available: NaN.
        """
        from vllm import SamplingParams

        if load.steering is Steering.DIRECTIONAL or load.scope != "all":
            raise ValueError(
                f"vllm-lens supports only add in scope all; the load uses {load.steering} in {load.scope}."
            )
        self._limit(load.concurrency)
        prompts = load.prompts(self.model_config.get_vocab_size())
        params = []
        for request in range(load.num_requests):
            number = load.vector_of(request)
            extra = {} if number is None else {"extra_args": {"apply_steering_vectors": [self.vectors[number]]}}
            params.append(SamplingParams(**sampling(load, check), **extra))
        start = time.perf_counter()
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        seconds = time.perf_counter() - start
        return Timing(
            seconds=seconds,
            output_tokens=sum(len(output.outputs[0].token_ids) for output in outputs),
            prompt_tokens=sum(map(len, prompts)),
            ttft_ms=float("nan"),
            itl_ms=float("nan"),
            cached_tokens=sum(output.num_cached_tokens or 0 for output in outputs),
            prompt_logprobs=[mean_logprob(output) for output in outputs] if check else [],
            applied={"answers": [list(output.outputs[0].token_ids) for output in outputs]} if check else {},
        )

    def _limit(self, concurrency: int) -> None:
        """Limit the requests in flight. The scheduler reads this limit in every step."""
        scheduler = self.engine.engine_core.engine_core.scheduler
        most = self.engine.vllm_config.scheduler_config.max_num_seqs
        if concurrency > most:
            raise ValueError(f"The load has {concurrency} concurrent requests; the engine's max_num_seqs is {most}.")
        scheduler.max_num_active_reqs = concurrency
