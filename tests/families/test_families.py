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
from helpers.families import ANSWER, FORM, PROMPT, REFUSED, SCALE, directions, make_refused
from vllm.distributed import cleanup_dist_env_and_memory

from steer_engine import LLM
from steer_engine.errors import UnsupportedEngineError
from steer_engine.vectors import ControlVector, VectorMetadata

QUICK = ("stablelm", "gpt_neox")
"""One of each form that Llama does not have; the others run with ALL=1."""

_MLA = {"attention_backend": "CPU_MLA", "block_size": 16}
"""What vLLM takes by itself where the processor has AMX computes in bfloat16 only."""
_TORCH_ROTARY = {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}
"""vLLM 0.32's eager kernel for CPUs rotates queries of shape [T, heads, D] wrongly, in plain vLLM too."""
ENGINE: dict[str, dict[str, Any]] = {"deepseek_v2": _MLA, "deepseek_v3": _MLA, "lfm2": _TORCH_ROTARY}

Answers = Callable[[str], tuple[str, np.ndarray, np.ndarray]]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Answers:
    """Checkpoint, ids and logprobs of an architecture, see families.py; all of this run are made in one process."""
    folder = tmp_path_factory.mktemp("families")
    items = [item for item in request.session.items if item.module is request.module]
    wanted = sorted({item.callspec.params["name"] for item in items} & FORM.keys())
    script = Path(__file__).parents[1] / "helpers" / "families.py"
    limit = 120 + 20 * len(wanted)  # seconds; each takes 1 to 3 on a free core
    environment = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    subprocess.run(
        [sys.executable, "-P", str(script), str(folder), *wanted], check=True, env=environment, timeout=limit
    )

    def load(name: str) -> tuple[str, np.ndarray, np.ndarray]:
        saved = np.load(folder / f"{name}.npz")
        return str(folder / name), saved["ids"], saved["logprobs"]

    return load


@pytest.mark.timeout(900)  # the first test waits for the checkpoints of all
@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FORM])
def test_parity_at_every_block(answers: Answers, name: str) -> None:
    path, ids, logprobs = answers(name)
    vector = ControlVector(directions=dict(enumerate(directions())), metadata=VectorMetadata())
    llm = LLM(
        path,
        vectors={"v": vector},
        enforce_eager=True,
        dtype="float32",
        skip_tokenizer_init=True,
        enable_prefix_caching=False,
        **SETTINGS | {"num_gpu_blocks_override": 64} | ENGINE.get(name, {}),
    )
    try:
        assert_parity(llm, name, ids, logprobs)
    finally:
        del llm
        cleanup_dist_env_and_memory()


MODEL_CLASS = {"gemma3n_text": "Gemma3nDecoderLayer", "iquestloopcoder": "IQuestLoopCoderForCausalLM"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "iquestloopcoder" else pytest.mark.slow) for name in REFUSED]
)
def test_refused_by_name(tmp_path: Path, name: str) -> None:
    try:
        with pytest.raises(UnsupportedEngineError, match=MODEL_CLASS[name]):
            LLM(
                str(make_refused(name, tmp_path)),
                load_format="dummy",
                enforce_eager=True,
                dtype="float32",
                skip_tokenizer_init=True,
                **SETTINGS,
            )
    finally:
        cleanup_dist_env_and_memory()


def assert_parity(llm: LLM, name: str, ids: np.ndarray, logprobs: np.ndarray) -> None:
    """The probe's verdict, and prompt and answer of a plain run and of one steered at each block."""
    worker = llm.steering_status()["workers"][0]
    assert worker["armed_blocks"] == [0, 1, 2]
    assert set(worker["forms"].values()) == {FORM[name]}
    specs = [None, *(steering(edit("v", SCALE, blocks=block)) for block in range(3))]
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
    for block, error in enumerate(errors[1:]):
        assert error <= 8 * rounding, f"block {block}"
        effect = np.abs(logprobs[1 + block, of_prompt] - logprobs[0, of_prompt]).max()
        assert effect >= 100 * 8 * rounding, f"block {block} has no effect"
