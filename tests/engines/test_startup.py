"""What an engine says when it starts: refusals with a reason, unarmed engines untouched, unknown vLLMs named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vllm
from helpers.driving import edit, generate, sampled, steering, tokens
from helpers.engines import SETTINGS, TINY_BLOCKS, assert_meant, kept, random_vector
from helpers.tiny_models import rescaled, tiny_llama_path
from vllm.config import CUDAGraphMode, KVTransferConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.exceptions import VLLMValidationError

from steer_engine import LLM
from steer_engine.cli.engine_options import EngineChoice
from steer_engine.derive.capture_config import CaptureConfig
from steer_engine.derive.capture_engine import CaptureEngine
from steer_engine.errors import SteeringRequestError, UnsupportedEngineError
from steer_engine.settings import CONFIG_KEY, SteeringConfig
from steer_engine.vllm import examination, symbols
from steer_engine.vllm.patching import Patch, Symbol, apply, check_symbols
from steer_engine.vllm.plugin import register
from steer_engine.vllm.supported import check_supported, refuses_prompt_logprobs


def test_every_symbol_is_as_we_know_it() -> None:
    known = examination.all_symbols()
    assert len(known) >= 20
    check_symbols(known, vllm.__version__)


@pytest.mark.parametrize(
    ("symbol", "words"),
    [
        (Symbol("vllm.v1.worker.gpu.model_runner:GPUModelRunner.gone"), "is missing"),
        (Symbol("vllm.v1.worker.nowhere:GPUModelRunner.load_model"), "is missing"),
        (Symbol("vllm.v1.engine.core:EngineCore.preprocess_add_request", ("req",)), "has no parameter req"),
    ],
)
def test_an_unknown_vllm_is_named(symbol: Symbol, words: str) -> None:
    with pytest.raises(UnsupportedEngineError, match=words) as caught:
        check_symbols((symbol,), "9.99")
    assert "9.99" in caught.value.message
    assert symbol.path in caught.value.message


def test_registering_twice_wraps_once() -> None:
    owner, name = symbols.wrapped()[0].owner()
    before = getattr(owner, name)
    register()
    assert getattr(owner, name) is before


def test_wrapping_keeps_the_original_reachable() -> None:
    class Thing:
        def method(self) -> int:
            return 1

    import steer_engine.vllm.patching as patching

    patching.Thing = Thing  # type: ignore[attr-defined]
    symbol = Symbol("steer_engine.vllm.patching:Thing.method")
    make: Callable[..., Any] = lambda original: lambda self: original(self) + 1  # noqa: E731
    apply([Patch(symbol, make)])
    apply([Patch(symbol, make)])
    assert Thing().method() == 2


REFUSED: dict[str, Callable[[Any], object]] = {
    "micro-batching": lambda c: setattr(c.parallel_config, "enable_dbo", True),
    "prefill context": lambda c: setattr(c.parallel_config, "prefill_context_parallel_size", 2),
    "kv_sharing_fast_prefill": lambda c: setattr(c.cache_config, "kv_sharing_fast_prefill", True),
    "sleep mode": lambda c: setattr(c.model_config, "enable_sleep_mode", True),
    "runner type": lambda c: setattr(c.model_config, "runner_type", "pooling"),
    "encoder-decoder": lambda c: c.model_config.__dict__.update(is_encoder_decoder=True),
    "--monokernel": lambda c: object.__setattr__(c.kernel_config, "monokernel", True),  # a field of vLLM 0.33
    "elastic expert": lambda c: setattr(c.parallel_config, "enable_elastic_ep", True),
    "float16 with DeepSeek": lambda c: (
        setattr(c.model_config.hf_text_config, "model_type", "deepseek_v3"),
        setattr(c.model_config, "dtype", torch.float16),
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_modes_that_are_not_exact_are_refused(tiny_llama: str, what: str) -> None:
    config = EngineArgs(model=tiny_llama, enforce_eager=True, **SETTINGS).create_engine_config()
    check_supported(config)
    REFUSED[what](config)
    with pytest.raises(UnsupportedEngineError, match=what):
        check_supported(config)


TRANSFERS: dict[str, dict[str, Any]] = {
    # Disaggregated prefill: one engine computes the KV cache of a prompt, another generates.
    **{
        role: {"kv_transfer_config": KVTransferConfig(kv_connector="ExampleConnector", kv_role=role)}
        for role in ("kv_producer", "kv_consumer", "kv_both")
    },
    "offloading": {"kv_offloading_size": 0.1},
    "multiple": {
        "kv_transfer_config": KVTransferConfig(
            kv_connector="MultiConnector",
            kv_role="kv_both",
            kv_connector_extra_config={"connectors": [{"kv_connector": "ExampleConnector", "kv_role": "kv_both"}]},
        )
    },
}


@pytest.mark.parametrize("name", TRANSFERS)
def test_kv_connectors_of_every_role_are_refused(tiny_llama: str, name: str) -> None:
    config = EngineArgs(model=tiny_llama, enforce_eager=True, **SETTINGS, **TRANSFERS[name]).create_engine_config()
    assert config.kv_transfer_config is not None
    with pytest.raises(UnsupportedEngineError, match="a KV connector") as caught:
        check_supported(config)
    assert str(config.kv_transfer_config.kv_connector) in caught.value.message


@pytest.mark.parametrize("graphs", [CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL_AND_PIECEWISE, CUDAGraphMode.FULL])
def test_breakable_graphs_are_refused(tiny_llama: str, monkeypatch: pytest.MonkeyPatch, graphs: CUDAGraphMode) -> None:
    """vLLM switches them on by itself for some models, in the environment."""
    config = EngineArgs(model=tiny_llama, enforce_eager=True, **SETTINGS).create_engine_config()
    config.compilation_config.cudagraph_mode = graphs
    check_supported(config)
    monkeypatch.setenv("VLLM_USE_BREAKABLE_CUDAGRAPH", "1")
    if graphs == CUDAGraphMode.FULL:
        check_supported(config)
        return
    with pytest.raises(UnsupportedEngineError, match="VLLM_USE_BREAKABLE_CUDAGRAPH=0"):
        check_supported(config)


@pytest.mark.parametrize("lora", [True, False])
def test_prompt_logprobs_beside_adapters_are_refused_on_a_cpu(tiny_llama: str, lora: bool) -> None:
    config = EngineArgs(model=tiny_llama, enforce_eager=True, enable_lora=lora, **SETTINGS).create_engine_config()
    assert refuses_prompt_logprobs(config) == lora
    config.device_config.device_type = "cuda"
    assert not refuses_prompt_logprobs(config)


def test_sequence_parallel_moe_is_refused(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    config = EngineArgs(model=tiny_llama, enforce_eager=True, **SETTINGS).create_engine_config()
    monkeypatch.setattr(type(config.parallel_config), "use_sequence_parallel_moe", True)
    with pytest.raises(UnsupportedEngineError, match="sequence-parallel MoE"):
        check_supported(config)


def test_the_rust_front_end_is_refused(tiny_llama: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    config = EngineArgs(model=tiny_llama, enforce_eager=True, **SETTINGS).create_engine_config()
    with pytest.raises(UnsupportedEngineError, match="VLLM_USE_RUST_FRONTEND"):
        check_supported(config)


def test_settings_are_checked(tiny_llama: str) -> None:
    with pytest.raises(UnsupportedEngineError, match="rowz"):
        SteeringConfig.from_additional_config({CONFIG_KEY: {"rowz": 1}})
    with pytest.raises(UnsupportedEngineError, match="3 blocks"):
        LLM(tiny_llama, steering=SteeringConfig(blocks="1-3"), enforce_eager=True, **SETTINGS)


def test_an_unarmed_engine_is_untouched_and_refuses(tiny_llama: str) -> None:
    plain = kept(vllm.LLM(tiny_llama, enforce_eager=True, dtype="float32", **SETTINGS))
    context = plain.llm_engine.vllm_config.compilation_config.static_forward_context
    assert CONFIG_KEY not in context
    prompt = tokens(5, 20)
    before = sampled(generate(plain, [prompt], [None])[0])
    with pytest.raises(SteeringRequestError, match="not armed"):
        generate(plain, [prompt], [steering(edit("r0"))])
    with pytest.raises(VLLMValidationError, match="not armed"):
        plain.llm_engine.input_processor.process_inputs(
            "direct",
            {"type": "token", "prompt_token_ids": prompt},
            vllm.SamplingParams(extra_args={"steering": steering(edit("r0"))}),
            supported_tasks=("generate",),
        )
    assert sampled(generate(plain, [prompt], [None])[0]) == before


GROWING = {
    "model.embed_tokens.weight": 100.0,
    "model.layers.0.mlp.down_proj.weight": 300.0,
    "model.layers.1.mlp.down_proj.weight": 3000.0,
    "model.layers.2.mlp.down_proj.weight": 8000.0,
}
"""The stream's rows get norms of 80 to about 30,000, as those of Gemma 3."""


@pytest.mark.v1_only
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_stream_that_grows_is_recognised(tiny_models_dir: Path, tmp_path: Path, dtype: str) -> None:
    path = rescaled(tiny_llama_path(tiny_models_dir), tmp_path / "growing", GROWING)
    llm = kept(LLM(str(path), capture=True, enforce_eager=True, dtype=dtype, **SETTINGS))
    assert_meant(llm, num_blocks=TINY_BLOCKS)
    (rows_LPD,) = llm.capture([{"prompt_token_ids": tokens(7, 20)}], "all")
    norms_L = np.linalg.norm(rows_LPD, axis=-1).mean(axis=1)
    assert norms_L[0] < 2000 < 10_000 < norms_L[-1] < 50_000


def test_a_leaner_engine(tiny_llama: str) -> None:
    """Only some blocks and one operation armed: those work, the others are refused by name."""
    config = SteeringConfig(blocks="1-2", ops=("add",), rows=1)
    vectors = {"r0": random_vector(0)}
    llm = kept(LLM(tiny_llama, vectors=vectors, steering=config, enforce_eager=True, dtype="float32", **SETTINGS))
    worker = llm.steering_status()["workers"][0]
    assert worker["armed_blocks"] == [1, 2]
    assert worker["ops"] == ["add"]
    prompt = tokens(6, 20)
    plain, steered = generate(llm, [prompt] * 2, [None, steering(edit("r0", 2.0, blocks="1-2"))])
    assert sampled(plain) != sampled(steered)
    for spec, words in (
        (steering(edit("r0")), "not armed"),
        (steering(edit("r0", op="ablate", blocks=1)), "--steering-ops"),
        (steering(edit("r0", blocks=1), edit("r0", blocks=1, scope="prompt")), "--steering-rows"),
    ):
        with pytest.raises(SteeringRequestError, match=words):
            generate(llm, [prompt], [spec])


@pytest.mark.v1_only
def test_an_engine_that_captures_texts_arms_only_what_it_captures(tiny_llama: str) -> None:
    config = CaptureConfig.of(
        tiny_llama, position="last", blocks="1-2", chat=False, source="pairs", dtype="float32", local=True,
        engine_args=EngineChoice(dtype="float32", max_model_len=512, gpu_memory_utilization=0.2).engine_args
        | {"num_gpu_blocks_override": 64},
    )  # fmt: skip
    engine = CaptureEngine(config)
    assert engine.facts().blocks == (1, 2)
    llm = kept(engine._llm)
    assert llm.armed_blocks == (1, 2)
    assert llm.llm_engine.vllm_config.cache_config.gpu_memory_utilization == 0.2
