"""The invariants on the engine that a GPU really runs: V2 runner, Triton kernels, compiled, replayed CUDA graphs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from helpers.gpu_settings import MODEL, REHEARSAL, VECTORS
from helpers.tiny_models import tiny_llama_path
from transformers import AutoModelForCausalLM
from vllm import SamplingParams

from steer_engine import LLM, resolve_model

TOKENS = 24
PROMPTS = [[int(t) for t in np.random.default_rng(seed).integers(1000, 40000, 12 + 3 * seed)] for seed in range(8)]
BOUND = 2e-3
"""Nats, float32: matrix products of different shapes and compiled kernels; plain vLLM is measured beside it."""

SPECS: list[dict[str, Any]] = [
    {"edits": [{"vector": "r0", "scale": 1.0}]},
    {"edits": [{"vector": "r1", "scale": 1.0, "scope": "generation"}]},
    {"edits": [{"vector": "r2", "op": "ablate"}, {"vector": "r3", "scale": -1.0, "blocks": "4-20"}]},
    {"edits": [{"vector": "r4", "op": "add_relative", "scale": 0.1}], "preserve_norm": True},
]


def params(spec: dict[str, Any] | None, **fields: Any) -> SamplingParams:
    extra = {} if spec is None else {"extra_args": {"steering": spec}}
    return SamplingParams(
        **{"temperature": 0.0, "max_tokens": TOKENS, "ignore_eos": True, "logprobs": 0, **fields}, **extra
    )


def run(llm: Any, specs: list[dict[str, Any] | None], **fields: Any) -> list[Any]:
    inputs: Any = [{"prompt_token_ids": prompt} for prompt in PROMPTS[: len(specs)]]
    llm.llm_engine.reset_prefix_cache()
    return list(llm.generate(inputs, [params(spec, **fields) for spec in specs], use_tqdm=False))


def said(output: Any) -> tuple[list[int], list[float]]:
    completion = output.outputs[0]
    ids = list(completion.token_ids)
    return ids, [step[token].logprob for token, step in zip(ids, completion.logprobs, strict=True)]


def test_it_is_the_engine_that_is_meant(llm: LLM) -> None:
    worker = llm.steering_status()["workers"][0]
    assert worker["armed_blocks"] == list(range(30))
    if not REHEARSAL:
        assert worker["runner"] == "vllm.v1.worker.gpu.model_runner.GPUModelRunner"
        assert worker["kernel"] == "triton"
        assert llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.name != "NONE"


@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
def test_what_graphs_replay_is_what_hugging_face_computes(llm: LLM, spec: dict[str, Any]) -> None:
    """Decoded tokens, whose steps are replayed graphs, teacher-forced through a model with hooks."""
    plain, steered = (said(run(llm, [s])[0]) for s in (None, spec))
    expected = [oracle_logprobs(PROMPTS[0], ids, s) for (ids, _), s in ((plain, None), (steered, spec))]
    noise = float(np.abs(np.subtract(plain[1], expected[0])).max())
    assert noise < BOUND, "plain vLLM itself differs from Hugging Face"
    assert np.abs(np.subtract(steered[1], expected[1])).max() < max(8 * noise, BOUND)
    unsteered = oracle_logprobs(PROMPTS[0], steered[0], None)
    assert np.abs(np.subtract(steered[1], unsteered)).max() > 20 * BOUND, "steering had no effect to speak of"


def test_neighbours_do_not_show(llm: LLM) -> None:
    """Same shapes, other steering beside it: the same bits."""
    mine = SPECS[0]
    seen = {
        json.dumps(said(run(llm, [mine, *others])[0]))
        for others in ([None] * 3, [SPECS[1], SPECS[2], None], [SPECS[3], SPECS[0], SPECS[2]])
    }
    assert len(seen) == 1


def test_slots_are_clean_after_their_request(llm: LLM) -> None:
    """Unsteered requests in slots that steered ones have just left answer as before, bit for bit."""
    before = [said(output) for output in run(llm, [None] * 8)]
    steered = [said(output) for output in run(llm, [SPECS[seed % 4] for seed in range(8)])]
    after = [said(output) for output in run(llm, [None] * 8)]
    assert before == after
    assert all(a != b for a, b in zip(before, steered, strict=True))


def test_silence_is_plain_vllm(llm: LLM) -> None:
    """Against a stock engine in a process of its own."""
    stock = in_own_process(resolve_model(MODEL), steered=False)
    mine = [said(output) for output in run(llm, [None] * 8)]
    for (ids, logprobs), (their_ids, their_logprobs) in zip(mine, stock, strict=True):
        assert ids == their_ids
        assert np.abs(np.subtract(logprobs, their_logprobs)).max() < BOUND


@pytest.fixture(scope="module")
def even_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random Llama of the same shape, whose heads two GPUs can share."""
    heads = {"num_attention_heads": 18, "num_key_value_heads": 6}
    folder = tmp_path_factory.mktemp("models")
    return str(tiny_llama_path(folder, num_blocks=30, hidden_size=576, vocab_size=40960, **heads))


@pytest.fixture(scope="module")
def on_one(even_model: str) -> list[tuple[list[int], list[float]]]:
    return in_own_process(even_model, steered=True)


@pytest.mark.skipif(torch.cuda.device_count() < 2 and not REHEARSAL, reason="needs two GPUs")
@pytest.mark.parametrize("setting", ["tensor_parallel_size", "pipeline_parallel_size"])
def test_two_gpus_steer_as_one(even_model: str, on_one: list[tuple[list[int], list[float]]], setting: str) -> None:
    if REHEARSAL and setting == "pipeline_parallel_size":
        pytest.skip("on a processor vLLM needs a repair for that: tests/engines/test_pipeline_parallel.py")
    on_two = in_own_process(even_model, steered=True, **{setting: 2})
    for (ids, logprobs), (their_ids, their_logprobs) in zip(on_one, on_two, strict=True):
        agreed = next((n for n, (a, b) in enumerate(zip(ids, their_ids, strict=True)) if a != b), len(ids))
        assert agreed >= 1
        assert np.abs(np.subtract(logprobs[:agreed], their_logprobs[:agreed])).max() < 10 * BOUND


def oracle_logprobs(prompt: list[int], ids: list[int], spec: dict[str, Any] | None) -> list[float]:
    """Teacher-forced, float32, with hooks in float64."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = _MODELS.get(device)
    if model is None:
        model = AutoModelForCausalLM.from_pretrained(resolve_model(MODEL), dtype=torch.float32).eval().to(device)
        _MODELS[device] = model
    handles = [
        block.register_forward_hook(lambda _m, _a, out, n=number: edited(out, n, spec, len(prompt)))
        for number, block in enumerate(model.model.layers)
        if spec is not None
    ]
    try:
        with torch.inference_mode():
            logits_TV = model(torch.tensor([prompt + ids], device=device)).logits[0].double()
    finally:
        for handle in handles:
            handle.remove()
    logprobs_TV = logits_TV.log_softmax(-1).cpu().numpy()
    return [float(logprobs_TV[len(prompt) - 1 + n, token]) for n, token in enumerate(ids)]


_MODELS: dict[str, Any] = {}


def edited(output: Any, block: int, spec: dict[str, Any], prompt_len: int) -> Any:
    """The block's output as the spec's definitions say."""
    stream = output[0] if isinstance(output, tuple) else output
    before = stream.double()
    x = before.clone()
    for edit in spec["edits"]:
        first, last = (int(n) for n in edit.get("blocks", "0-29").split("-"))
        if not first <= block <= last:
            continue
        v = torch.from_numpy(VECTORS[edit["vector"]].directions[block].copy()).to(x)
        start = prompt_len - 1 if edit.get("scope") == "generation" else 0
        unit, row = v / v.norm(), x[:, start:]
        match edit.get("op", "add"):
            case "add":
                row = row + edit["scale"] * v
            case "add_relative":
                row = row + edit["scale"] * row.norm(dim=-1, keepdim=True) * unit
            case "ablate":
                row = row - (row @ unit).unsqueeze(-1) * unit
        x = torch.cat([x[:, :start], row], dim=1)
    if spec.get("preserve_norm"):
        x = x * before.norm(dim=-1, keepdim=True) / x.norm(dim=-1, keepdim=True)
    x = x.to(stream)
    return (x, *output[1:]) if isinstance(output, tuple) else x


def in_own_process(model: str, *, steered: bool, **settings: Any) -> list[tuple[list[int], list[float]]]:
    """What another engine says to the same prompts: ours where they are steered, else stock vLLM."""
    code = f"""
import json, sys
if __name__ == "__main__":
    sys.path[:0] = {[os.path.dirname(os.path.dirname(__file__))]!r}
    from helpers.gpu_settings import SETTINGS, VECTORS
    from gpu.test_gpu_engine import SPECS, run, said
    settings = SETTINGS | {settings!r}
    if {steered}:
        from steer_engine import LLM
        llm = LLM({model!r}, vectors=VECTORS, dtype="float32", **settings)
        specs = [SPECS[seed % 4] for seed in range(8)]
    else:
        import vllm
        llm = vllm.LLM({model!r}, dtype="float32", **settings)
        specs = [None] * 8
    print("ANSWER" + json.dumps([said(output) for output in run(llm, specs)]))
"""
    environment = dict(os.environ) | ({"VLLM_ENABLE_V1_MULTIPROCESSING": "1"} if settings else {})
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, env=environment)
    lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWER")]
    assert lines, done.stderr[-2000:]
    return [(ids, logprobs) for ids, logprobs in json.loads(lines[-1].removeprefix("ANSWER"))]
