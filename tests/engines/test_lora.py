"""An adapter and steering in one request: both, exactly, beside requests that have one of them or neither."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.driving import params
from helpers.engines import ROW_SETS, TINY_BLOCKS, VECTORS
from helpers.oracle import Oracle
from helpers.traffic import SPECS, Start, asks, assert_right
from safetensors.torch import save_file
from vllm.exceptions import VLLMValidationError
from vllm.lora.request import LoRARequest

RANK, ALPHA = 8, 16


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory, oracle: Oracle) -> Path:
    """A random adapter of every query and output projection, in PEFT's format."""
    folder = tmp_path_factory.mktemp("adapter")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": ["q_proj", "o_proj"],
        "bias": "none",
    }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    generator = torch.Generator().manual_seed(5)
    weights = {}
    for block in range(TINY_BLOCKS):
        for name in config["target_modules"]:
            module = getattr(oracle.model.model.layers[block].self_attn, name)
            path = f"base_model.model.model.layers.{block}.self_attn.{name}"
            weights[f"{path}.lora_A.weight"] = torch.randn(RANK, module.in_features, generator=generator) * 0.2
            weights[f"{path}.lora_B.weight"] = torch.randn(module.out_features, RANK, generator=generator) * 0.2
    save_file(weights, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def adapted(tiny_llama: str, adapter: Path) -> Oracle:
    """The Hugging Face model with the adapter in its weights."""
    from safetensors.torch import load_file

    merged = Oracle(tiny_llama, VECTORS, ROW_SETS)
    weights = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name in [name for name in weights if name.endswith("lora_A.weight")]:
            path = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            delta = weights[name.replace("lora_A", "lora_B")] @ weights[name] * (ALPHA / RANK)
            merged.model.get_submodule(path).weight += delta
    return merged


@pytest.mark.slow_on_v2
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_an_adapter_and_steering_in_one_request(start: Start, oracle: Oracle, adapted: Oracle, adapter: Path) -> None:
    # vLLM 0.32 on a CPU gives rows without an adapter the last of its places: with one place more, that one is empty.
    llm = start(enable_lora=True, max_loras=2, max_lora_rank=RANK, max_num_batched_tokens=64, max_num_seqs=16)
    requested = asks(3 * len(SPECS), shared=40)
    with_adapter = [i % 3 != 0 for i in range(len(requested))]  # against 8 specs: each comes with and without
    request = LoRARequest("random", 1, str(adapter))
    inputs: Any = [{"prompt_token_ids": ask.prompt} for ask in requested]
    wanted = [params(ask.steering, max_tokens=ask.max_tokens) for ask in requested]
    for _ in ("cold", "warm"):
        outputs = llm.generate(
            inputs, wanted, use_tqdm=False, lora_request=[request if it else None for it in with_adapter]
        )
        for judge, chosen in ((adapted, True), (oracle, False)):
            mine = [i for i, it in enumerate(with_adapter) if it is chosen]
            assert_right(judge, [requested[i] for i in mine], [outputs[i] for i in mine])
    assert sum(output.num_cached_tokens or 0 for output in outputs) > 0
    both = requested[1]
    assert both.spec is not None
    moved = adapted.logprobs(both.prompt, both.spec)[-1] - oracle.logprobs(both.prompt, both.spec)[-1]
    assert abs(moved).max() > 1e-2, "the adapter does nothing"
    # Two of these would end the engine.
    logprobs_too = [params(None, max_tokens=2, prompt_logprobs=0) for _ in range(2)]
    with pytest.raises(VLLMValidationError, match="prompt_logprobs"):
        llm.generate(inputs[:2], logprobs_too, use_tqdm=False)
    assert len(llm.generate(inputs[:2], wanted[:2], use_tqdm=False)) == 2
