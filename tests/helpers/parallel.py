"""Requests to an engine over several workers, and how far its answers are from those of Hugging Face."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.driving import edit, steering, tokens
from helpers.engines import RUNNER, SETTINGS
from helpers.oracle import Oracle
from helpers.oracle_probes import assert_numbers
from helpers.tiny_models import tiny_llama_path

LONG = 11
LAST_PROBED = 2
PROMPTS = [tokens(seed, 20 + 9 * seed) for seed in range(4)]

SPECS: list[Any] = [
    None,
    steering(edit("r0", 1.5)),
    steering(edit("r1", 1.2, scope="generation"), edit("r2", 0.4, op="add_relative")),
    steering(
        edit("r3", op="ablate"),
        edit("r4", 0.8, blocks=[1, 2], gate={"vector": "r7", "min_cos": 0.0}),
        edit("r6", 0.8, site="attn"),
        edit("r5", op="ablate", site="mlp"),
    ),
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
PROBES = [
    {"name": "everywhere", "vector": "r9", "measure": "dot", "scope": "all"},
    {"name": "late", "vector": "r10", "blocks": [LAST_PROBED], "after": True},
    {"name": "early", "vector": "r11", "blocks": [0], "measure": "dot"},
]
PROBED: list[list[Any]] = [
    [PROMPTS[0], {"probes": PROBES}],
    [PROMPTS[1], {**SPECS[1], "probes": PROBES[:2]}],
    [PROMPTS[2], {**SPECS[2], "probes": PROBES[1:2]}],
    [PROMPTS[3], {**SPECS[3], "probes": PROBES[2:]}],
    [PROMPTS[1], SPECS[1]],
]
"""Probes at blocks of one worker or of all."""
USED = (*range(8), 9, 10, 11)
"""The numbers of the vectors that `BATCHES` and `PROBED` need: r8 only cancels itself."""
WRONG = f"sha256:{64 * '0'}"
ROUNDING_FACTOR = 8.0
"""Of what two workers and Hugging Face differ by without steering: an edited stream is of another size."""


def run(folder: Path, model: str, num_blocks: int, *, timeout: int = 560, **llm: Any) -> dict[str, Any]:
    """What `parallel_process.py` found for `BATCHES` within `timeout` seconds, on an engine with these settings."""
    eager = {**SETTINGS, "dtype": "float32", "enforce_eager": True, "max_num_batched_tokens": 256, "max_logprobs": 1}
    settings = {
        "model": model,
        "num_blocks": num_blocks,
        "llm": {**eager, **llm},
        "batches": BATCHES,
        "probed": PROBED,
        "params": {"max_tokens": LONG, "prompt_logprobs": 0},
        "wrong": WRONG,
    }
    (folder / "settings.json").write_text(json.dumps(settings))
    script = Path(__file__).with_name("parallel_process.py")
    command = [sys.executable, "-P", str(script), str(folder / "settings.json"), str(folder / "out.json")]
    env = {"VLLM_CPU_OMP_THREADS_BIND": "0|1", **os.environ, "STEER_TEST_RUNNER": RUNNER}
    subprocess.run(command, check=True, timeout=timeout, env=env)
    found: dict[str, Any] = json.loads((folder / "out.json").read_text())
    return found


def fixture(num_blocks: int, **llm: Any) -> Callable[..., Any]:
    """A fixture of a test file: what `run` found, once for the file, on a tiny Llama with `num_blocks` blocks."""

    @pytest.fixture(scope="module", name="parallel")
    def found(tiny_models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
        model = tiny_llama_path(tiny_models_dir, num_blocks=num_blocks)
        return run(tmp_path_factory.mktemp("parallel"), str(model), num_blocks, **llm)

    return found


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


def assert_oracle(parallel: dict[str, Any], oracle: Oracle, *, most: float = 5e-5) -> None:
    """Every answer is Hugging Face's, up to what the two differ by without steering; and steering did something.

    most: by how much they may differ without steering, in nats.
    """
    rounding = max(differences(oracle, parallel, 0))
    assert rounding < most, "plain vLLM itself differs from Hugging Face"
    for batch in range(1, len(BATCHES)):
        assert max(differences(oracle, parallel, batch)) <= ROUNDING_FACTOR * rounding
    for number, spec in enumerate(SPECS):
        if spec is not None:
            prompt, (answer, *_) = PROMPTS[number], parallel["batches"][1][number]
            effect = np.abs(expected(oracle, prompt, answer, spec) - expected(oracle, prompt, answer, None)).max()
            assert effect >= 100 * ROUNDING_FACTOR * rounding, "steering had no effect to speak of"


def assert_neighbours_do_not_matter(parallel: dict[str, Any]) -> None:
    plain, mixed, other, _ = parallel["batches"]
    assert plain[0] == mixed[0] == other[0]
    assert mixed[1] == other[1]
    assert plain[3] == other[3]
    assert mixed[2] != other[2]


def assert_algebra(parallel: dict[str, Any]) -> None:
    plain, mixed, _, algebra = parallel["batches"]
    assert algebra[0] == plain[0]
    assert algebra[1] == mixed[1]
    assert algebra[2] == plain[2]


def assert_read(parallel: dict[str, Any], oracle: Oracle, num_blocks: int, hidden_size: int) -> None:
    """The captured rows of the first prompt equal those of Hugging Face."""
    import torch

    with torch.inference_mode():
        states = oracle.model(torch.tensor([PROMPTS[0]]), output_hidden_states=True).hidden_states
    captured_LPD = np.array(parallel["captured"])
    assert captured_LPD.shape == (num_blocks, len(PROMPTS[0]), hidden_size)
    for block in range(num_blocks - 1):  # the last of Hugging Face's states is normed
        np.testing.assert_allclose(captured_LPD[block], states[block + 1][0], rtol=1e-4, atol=1e-5)


def assert_probes(parallel: dict[str, Any], oracle: Oracle) -> None:
    """Every number is the oracle's, whichever worker measured it; and the answers are as without probes."""
    for (prompt, spec), (answer, told) in zip(PROBED, parallel["probed"], strict=True):
        if "probes" in spec:
            assert_numbers(oracle, prompt, answer, spec if "edits" in spec else None, spec["probes"], told)
    answers = [answer for answer, _ in parallel["probed"]]
    assert answers[:2] == [parallel["batches"][0][0][0], parallel["batches"][1][1][0]]
    assert answers[4] == answers[1]
