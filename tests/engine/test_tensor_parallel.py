"""The invariants on two tensor-parallel workers: each has the same vectors and edits the same stream.

They run in a process of their own, since a worker per rank is a process; the oracle is here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from driving import edit, steering, tokens
from engines import RUNNER_CLASS, SETTINGS, TINY_BLOCKS, random_vector
from oracle import Oracle

pytestmark = [pytest.mark.slow, pytest.mark.v1_only, pytest.mark.timeout(600)]

WORLD = 2
LONG = 11
VECTORS = {f"r{seed}": random_vector(seed) for seed in range(32)}
PROMPTS = [tokens(seed, 20 + 9 * seed) for seed in range(4)]

SPECS: list[Any] = [
    None,
    steering(edit("r0", 1.5)),
    steering(edit("r1", 1.2, scope="generation"), edit("r2", 0.4, op="add_relative")),
    steering(edit("r3", op="ablate"), edit("r4", 0.8, blocks=[1, 2], gate={"vector": "r7", "min_cos": 0.0})),
]
CLAMPED = steering({"vector": "r5", "op": "set", "target": 2.0}, edit("r6", -1.0, blocks=0))
BATCHES: list[list[list[Any]]] = [
    [[prompt, None] for prompt in PROMPTS],
    [[prompt, spec] for prompt, spec in zip(PROMPTS, SPECS, strict=True)],
    # The same shapes, other neighbours: the first request is plain again, the second asks as before.
    [[PROMPTS[0], None], [PROMPTS[1], SPECS[1]], [PROMPTS[2], CLAMPED], [PROMPTS[3], None]],
    # 0*v, v - v, and two halves.
    [
        [PROMPTS[0], steering(edit("r0", 0.0))],
        [PROMPTS[1], steering(edit("r0", 0.75), edit("r0", 0.75))],
        [PROMPTS[2], steering(edit("r8"), edit("r8", -1.0))],
        [PROMPTS[3], None],
    ],
]
WRONG = f"sha256:{64 * '0'}"
ROUNDING_FACTOR = 8.0
"""Of what two workers and Hugging Face differ by without steering: an edited stream is of another size."""


@pytest.fixture(scope="module")
def parallel(tiny_llama: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("parallel")
    llm = {**SETTINGS, "dtype": "float32", "enforce_eager": True, "max_num_batched_tokens": 256, "max_logprobs": 1}
    settings = {
        "model": tiny_llama,
        "llm": {**llm, "tensor_parallel_size": WORLD},
        "batches": BATCHES,
        "params": {"max_tokens": LONG, "prompt_logprobs": 0},
        "wrong": WRONG,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    script = Path(__file__).with_name("parallel_process.py")
    command = [sys.executable, "-P", str(script), str(folder / "settings.json"), str(folder / "out.json")]
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", **os.environ}
    subprocess.run(command, check=True, timeout=560, env=env)
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


@pytest.fixture(scope="module")
def oracle(tiny_llama: str) -> Oracle:
    return Oracle(tiny_llama, VECTORS)


def expected(oracle: Oracle, prompt: list[int], answer: list[int], spec: Any) -> np.ndarray:
    """Teacher-forced logprobs of all tokens but the first."""
    ids = prompt + answer
    logprobs_TV = oracle.logprobs(ids, spec, len(prompt))
    return np.array([logprobs_TV[t, token] for t, token in enumerate(ids[1:])])


def differences(oracle: Oracle, parallel: dict[str, Any], batch: int) -> list[float]:
    """Per request, how far the engine is from the oracle, over prompt and answer."""
    found = []
    for (prompt, spec), (answer, logprobs, of_prompt) in zip(BATCHES[batch], parallel["batches"][batch], strict=True):
        got = np.array([*of_prompt, *logprobs])
        assert np.isfinite(got).all()
        found.append(float(np.abs(got - expected(oracle, prompt, answer, spec)).max()))
    return found


def test_every_worker_is_armed_and_holds_the_same_vectors(parallel: dict[str, Any]) -> None:
    first, *others = workers = parallel["workers"]
    assert len(workers) == WORLD
    assert first["runner"] == RUNNER_CLASS
    assert first["armed_blocks"] == list(range(TINY_BLOCKS))
    assert first["vectors"] == sorted({VECTORS[f"r{seed}"].digest for seed in range(8)}), "r8 - r8 is nothing"
    for other in others:
        assert other == first


def test_a_vector_that_ranks_refuse_is_held_by_none(parallel: dict[str, Any]) -> None:
    assert not parallel["refused"]["ok"]
    assert "hashes to" in parallel["refused"]["reason"]
    assert all(WRONG not in worker["vectors"] for worker in parallel["workers"])


def test_oracle(parallel: dict[str, Any], oracle: Oracle) -> None:
    rounding = max(differences(oracle, parallel, 0))
    assert rounding < 5e-5, "plain vLLM itself differs from Hugging Face"
    for batch in range(1, len(BATCHES)):
        assert max(differences(oracle, parallel, batch)) <= ROUNDING_FACTOR * rounding
    for number, spec in enumerate(SPECS):
        if spec is not None:
            prompt, (answer, *_) = PROMPTS[number], parallel["batches"][1][number]
            effect = np.abs(expected(oracle, prompt, answer, spec) - expected(oracle, prompt, answer, None)).max()
            assert effect >= 100 * ROUNDING_FACTOR * rounding, "steering had no effect to speak of"


def test_neighbours_do_not_matter(parallel: dict[str, Any]) -> None:
    plain, mixed, other, _ = parallel["batches"]
    assert plain[0] == mixed[0] == other[0]
    assert mixed[1] == other[1]
    assert plain[3] == other[3]
    assert mixed[2] != other[2]


def test_algebra(parallel: dict[str, Any]) -> None:
    plain, mixed, _, algebra = parallel["batches"]
    assert algebra[0] == plain[0]
    assert algebra[1] == mixed[1]
    assert algebra[2] == plain[2]


def test_the_stream_is_read_whole(parallel: dict[str, Any], oracle: Oracle) -> None:
    """Each worker has the whole stream, not its share of it: what one reads is what Hugging Face has."""
    import torch

    with torch.inference_mode():
        states = oracle.model(torch.tensor([PROMPTS[0]]), output_hidden_states=True).hidden_states
    captured_LPD = np.array(parallel["captured"])
    assert captured_LPD.shape == (TINY_BLOCKS, len(PROMPTS[0]), VECTORS["r0"].hidden_size)
    for block in range(TINY_BLOCKS - 1):  # the last of Hugging Face's states is normed
        np.testing.assert_allclose(captured_LPD[block], states[block + 1][0], rtol=1e-4, atol=1e-5)
