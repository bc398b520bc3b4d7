"""Architectures of every stream form: the probe finds the form, and steering at each block equals Hugging Face's."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.driving import edit, generate, prompt_logprobs, sampled, steering
from helpers.engines import SETTINGS
from helpers.families import ANSWER, PROMPT, SCALE, directions
from helpers.family_settings import FORM
from helpers.refused_families import NOT_HERE, REFUSED, make_refused
from vllm.distributed import cleanup_dist_env_and_memory

from steer_engine import LLM
from steer_engine.errors import UnsupportedEngineError
from steer_engine.settings import SteeringConfig
from steer_engine.site import SITES_IN_BLOCKS, Site
from steer_engine.vectors import ControlVector, VectorMetadata

QUICK = ("stablelm", "gpt_neox")
"""One of each form that Llama does not have; the others run with ALL=1."""

_MLA = {"attention_backend": "CPU_MLA", "block_size": 16}
"""What vLLM takes by itself where the processor has AMX computes in bfloat16 only."""
_TORCH_ROTARY = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
"""vLLM 0.32's eager kernel for CPUs rotates queries of shape [T, heads, D] wrongly, in plain vLLM too."""
ENGINE: dict[str, dict[str, Any]] = {
    "deepseek_v2": _MLA,
    "deepseek_v3": _MLA,
    "lfm2": _TORCH_ROTARY,
}

Answers = Callable[[str], tuple[str, np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Answers:
    """Checkpoint, ids and logprobs of an architecture, see families; all of this run are made in one process."""
    folder = tmp_path_factory.mktemp("families")
    items = [item for item in request.session.items if item.module is request.module]
    wanted = sorted({item.callspec.params["name"] for item in items} & FORM.keys())
    limit = 120 + 20 * len(wanted)  # seconds; each takes 1 to 3 on a free core
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parents[1]), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-P", "-m", "helpers.families", str(folder), *wanted]
    subprocess.run(command, check=True, env=environment, timeout=limit)

    def load(name: str) -> tuple[str, np.ndarray, np.ndarray]:
        saved = np.load(folder / f"{name}.npz")
        return str(folder / name), saved["ids"], saved["logprobs"]

    return load


def engine(path: str, name: str, **settings: Any) -> LLM:
    vector = ControlVector(directions=dict(enumerate(directions())), metadata=VectorMetadata())
    return LLM(
        path,
        vectors={"v": vector},
        enforce_eager=True,
        dtype="float32",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        **SETTINGS | {"num_gpu_blocks_override": 64} | ENGINE.get(name, {}) | settings,
    )


@pytest.mark.timeout(900)  # the first test waits for the checkpoints of all
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FORM])
def test_parity_at_every_block(answers: Answers, name: str) -> None:
    path, ids, logprobs = answers(name)
    llm = engine(path, name)
    try:
        assert_parity(llm, name, ids, logprobs)
    finally:
        del llm
        cleanup_dist_env_and_memory()


SITES_HERE = {
    "llama": {"attn": ["self_attn"], "mlp": ["mlp"]},
    "qwen3": {"attn": ["self_attn"], "mlp": ["mlp"]},
    "gemma3_text": {
        "attn": ["self_attn and post_attention_layernorm"],
        "mlp": ["mlp and post_feedforward_layernorm"],
    },
    "gpt_neox": {"attn": ["attention"], "mlp": ["mlp"]},
    "mixtral": {"attn": ["self_attn"], "mlp": ["block_sparse_moe"]},
}
"""Architecture -> vLLM's modules whose outputs are edited at each site."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", SITES_HERE)
def test_parity_at_every_site(answers: Answers, name: str) -> None:
    path, ids, logprobs = answers(name)
    llm = engine(path, name, capture=True, steering=SteeringConfig(sites=SITES_IN_BLOCKS))
    try:
        assert llm.steering_status()["workers"][0]["site_modules"] == SITES_HERE[name]
        assert_parity(llm, name, ids, logprobs, sites=tuple(Site))
        with np.load(f"{path}.npz") as saved:
            assert_outputs(llm, saved["outputs"])
    finally:
        del llm
        cleanup_dist_env_and_memory()


WITHOUT = {
    ("opt", "mlp"): r"blocks 0-2 \(OPTDecoderLayer\) have no MLP in a module of its own",
    ("mamba2", "attn"): r"blocks 0-2 \(Mamba2DecoderLayer\) have no attention in a module of its own",
    ("granitemoehybrid", "attn"): r"blocks 0, 2 \(GraniteMoeHybridMambaDecoderLayer\) have no attention in a module",
}


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("name", "site"), WITHOUT)
def test_a_site_that_a_model_lacks_is_refused(answers: Answers, name: str, site: str) -> None:
    try:
        with pytest.raises(UnsupportedEngineError, match=WITHOUT[name, site]):
            engine(answers(name)[0], name, steering=SteeringConfig(sites=(Site(site),)))
    finally:
        cleanup_dist_env_and_memory()


def assert_outputs(llm: LLM, expected_LPD: np.ndarray) -> None:
    """Captured rows of attentions and MLPs equal what Hugging Face's modules return, and no other module's."""
    ours_LPD = np.concatenate([llm.capture([PROMPT], "all", site=site)[0] for site in SITES_IN_BLOCKS])
    assert ours_LPD.shape == expected_LPD.shape
    largest_L = np.abs(expected_LPD).max(axis=(1, 2))
    for point, rows_PD in enumerate(ours_LPD):
        errors_L = np.abs(rows_PD - expected_LPD).max(axis=(1, 2)) / largest_L[point]
        assert errors_L[point] <= 2e-5, point
        assert (np.delete(errors_L, point) >= 1e-2).all(), point


MODEL_CLASS = {"gemma3n_text": "Gemma3nDecoderLayer", "iquestloopcoder": "IQuestLoopCoderForCausalLM"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "iquestloopcoder" else pytest.mark.slow) for name in REFUSED]
)
def test_refused_by_name(tmp_path: Path, name: str) -> None:
    try:
        with pytest.raises(UnsupportedEngineError, match=MODEL_CLASS[name]):
            no_weights_engine(make_refused(name, tmp_path))
    finally:
        cleanup_dist_env_and_memory()


VLLM_SAYS = {
    "internlm": r"was supported in vLLM until v0\.23",
    "deepseek_v32": "Sparse Attention is not supported on CPU",
    "glm_moe_dsa": "Sparse Attention is not supported on CPU",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_HERE)
def test_what_plain_vllm_does_not_run_here(tmp_path: Path, name: str) -> None:
    """When one of these starts to run, it needs a row of its own."""
    try:
        with pytest.raises(Exception, match=VLLM_SAYS[name]):
            no_weights_engine(make_refused(name, tmp_path))
    finally:
        cleanup_dist_env_and_memory()


def no_weights_engine(path: Path) -> LLM:
    return LLM(
        str(path), load_format="dummy", enforce_eager=True, dtype="float32", skip_tokenizer_init=True, **SETTINGS
    )


def assert_parity(
    llm: LLM, name: str, ids: np.ndarray, logprobs: np.ndarray, sites: tuple[Site, ...] = (Site.BLOCK,)
) -> None:
    """The probe's verdict, and prompt and answer of a plain run and of one steered at each block of each site."""
    places = [(site, block) for site in sites for block in range(3)]
    ids, logprobs = ids[: 1 + len(places)], logprobs[: 1 + len(places)]
    worker = llm.steering_status()["workers"][0]
    assert worker["armed_blocks"] == [0, 1, 2]
    assert set(worker["forms"].values()) == {FORM[name]}
    specs = [None, *(steering(edit("v", SCALE, blocks=block, site=site.value)) for site, block in places)]
    outputs = generate(llm, [PROMPT] * len(specs), specs, prompt_logprobs=0, max_tokens=ANSWER)
    answered = [sampled(output) for output in outputs]
    assert [answer for answer, _ in answered] == ids.tolist()
    errors = [
        float(np.abs([*prompt_logprobs(output), *of_answer] - expected).max())
        for output, (_, of_answer), expected in zip(outputs, answered, logprobs, strict=True)
    ]
    rounding = max(errors[0], 5e-6)
    assert rounding < 1e-3, "plain vLLM itself differs from Hugging Face"
    of_prompt = slice(len(PROMPT) - 1)  # whose tokens all have in common
    for number, (place, error) in enumerate(zip(places, errors[1:], strict=True), start=1):
        assert error <= 8 * rounding, place
        effect = np.abs(logprobs[number, of_prompt] - logprobs[0, of_prompt]).max()
        assert effect >= 100 * 8 * rounding, f"{place} has no effect"
