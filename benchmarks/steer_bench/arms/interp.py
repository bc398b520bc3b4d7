"""interp-engine 1.14.2 with its forward hooks, on a plain vLLM engine in this process.

Its own `VLLMModel` is asynchronous and calls the worker through `collective_rpc`. This arm calls the same functions
(`worker_register_steering`, `worker_unregister_steering`) directly on the worker. That is faster, so the comparison
favors interp-engine.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

from steer_bench.arms.drive import drive
from steer_bench.arms.stock import engine_facts, sampling
from steer_bench.load import Load, Steering, vector
from steer_bench.settings import Settings
from steer_bench.timing import Timing

ENVIRONMENT = {"VLLM_PLUGINS": ""}
ADD_SCALE = 8.0


def load(settings: Settings) -> Interp:
    from vllm import LLM

    if not settings.eager:
        raise ValueError("interp-engine supports steering by hooks only on an eager engine; set eager=True.")
    return Interp(LLM(settings.model, **settings.engine_args()), settings.num_vectors)


class Interp:
    """A `vllm.LLM` with interp-engine's hooks at the output of every block."""

    def __init__(self, llm: Any, num_vectors: int) -> None:
        self.requests = import_module("interp_engine.vllm_capture.requests")
        self.llm = llm
        self.engine = llm.llm_engine
        self.model_config = self.engine.vllm_config.model_config
        self.worker = self.engine.engine_core.engine_core.model_executor.driver_worker.worker
        config = self.model_config.hf_text_config
        self.num_blocks = config.num_hidden_layers
        self.specs = [
            [
                {"layer": block, "point": "resid_post", "op": "additive", "vector": row_D.tolist(), "coeff": ADD_SCALE}
                for block, row_D in enumerate(vector(number, self.num_blocks, config.hidden_size))
            ]
            for number in range(num_vectors)
        ]

    def describe(self) -> dict[str, Any]:
        import torch

        return {
            "interp_engine": version("interp-engine"),
            "outside_supported": "requires vllm 0.28.0; driven without its own VLLMModel",
            "num_blocks": self.num_blocks,
            "threads": torch.get_num_threads(),
            **engine_facts(self.engine),
        }

    def command(self, what: str, **arguments: Any) -> Any:
        if what == "reset_prefix_cache":
            return self.engine.reset_prefix_cache()
        raise ValueError(f"This arm has no command {what!r}.")

    def run(self, load: Load, *, check: bool = False) -> Timing:
        """check: also log-probabilities of the prompts, and the state of the hooks in the first step."""
        from vllm import SamplingParams

        if load.steering is Steering.DIRECTIONAL or load.scope != "all":
            raise ValueError(
                f"This arm supports only `additive` in scope all; the load uses {load.steering} in {load.scope}."
            )
        prompts = load.prompts(self.model_config.get_vocab_size())
        params = [SamplingParams(**sampling(load, check)) for _ in prompts]
        steering = _Steering(self, load)
        return drive(steering, load, prompts, params, inspect=self._applied if check else None)

    def _applied(self) -> dict[str, Any]:
        demux = self.worker._np_demux if hasattr(self.worker, "_np_demux") else None
        if demux is None:
            return {"steered": 0, "hooks": 0}
        debug = self.requests.worker_demux_debug(self.worker)
        return {"steered": len(demux.steer_mods), "hooks": len(debug["hooks"]), "last_error": debug["last_error"]}


class _Steering:
    """Engine interface for `drive` that registers each request's steering before it is added and removes it at the end.

    interp-engine matches requests by id prefix, so "1" would also steer "10". Therefore all ids have six digits.
    """

    def __init__(self, arm: Interp, load: Load) -> None:
        self._arm = arm
        self._load = load

    def add_request(self, request_id: str, prompt: dict[str, Any], params: Any) -> None:
        name = f"{int(request_id):06d}"
        number = self._load.vector_of(int(request_id))
        if number is not None:
            ids = prompt["prompt_token_ids"]
            self._arm.requests.worker_register_steering(
                self._arm.worker, name, self._arm.specs[number], prompt_len=len(ids)
            )
            # As in its `VLLMModel`: a steered request shares no cached prefix with other requests.
            prompt = {**prompt, "cache_salt": name}
        self._arm.engine.add_request(name, prompt, params)

    def step(self) -> list[Any]:
        outputs: list[Any] = self._arm.engine.step()
        for output in outputs:
            number = int(output.request_id.split("-")[0])
            if output.finished and self._load.vector_of(number) is not None:
                self._arm.requests.worker_unregister_steering(self._arm.worker, f"{number:06d}")
        return outputs
