"""The invariants on the engine that a GPU really runs: a real model, Triton kernels, compiled, replayed CUDA graphs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.driving import edit, generate, sampled, steering, tokens
from helpers.engines import KERNEL, RUNNER_CLASS
from helpers.exactness import forced
from helpers.gpu_settings import MOST, REHEARSAL, SETTINGS
from helpers.oracle import Oracle
from helpers.own_process import alone

from steer_engine import LLM

ANSWER = {"max_tokens": 24}
PROMPTS = [[1000 + token for token in tokens(seed, 12 + 3 * seed, 39_000)] for seed in range(8)]

SPECS: list[dict[str, Any]] = [
    steering(edit("r0", 1.0)),
    steering(edit("r1", 1.0, scope="generation")),
    steering(edit("r2", op="ablate"), edit("r3", -1.0, blocks="4-20")),
    steering(edit("r4", 0.1, op="add_relative"), preserve_norm=True),
    steering({"vector": "r5", "op": "rotate", "toward": "r6", "degrees": 60}, edit("r7", 1.0, blocks=29)),
]

Said = tuple[list[int], list[float]]


def run(llm: LLM, specs: list[dict[str, Any] | None]) -> list[Said]:
    """Tokens and logprobs of the first prompts, one per spec, with nothing from the prefix cache."""
    llm.llm_engine.reset_prefix_cache()
    return [sampled(output) for output in generate(llm, PROMPTS[: len(specs)], specs, **ANSWER)]


def test_it_is_the_engine_that_is_meant(real: LLM) -> None:
    worker = real.steering_status()["workers"][0]
    assert worker["armed_blocks"] == list(range(30))
    assert worker["runner"] == RUNNER_CLASS
    assert worker["kernel"] == KERNEL
    if not REHEARSAL:
        assert KERNEL == "triton"
        assert real.llm_engine.vllm_config.compilation_config.cudagraph_mode.name != "NONE"


@pytest.mark.parametrize("spec", SPECS, ids=range(len(SPECS)))
def test_what_graphs_replay_is_what_hugging_face_computes(real: LLM, real_oracle: Oracle, spec: dict[str, Any]) -> None:
    """Decoded tokens, whose steps are replayed graphs, teacher-forced through a model with hooks."""
    plain, steered = (run(real, [each])[0] for each in (None, spec))
    noise, error = (
        float(np.abs(np.subtract(logprobs, forced(real_oracle, PROMPTS[0], ids, each))).max())
        for (ids, logprobs), each in ((plain, None), (steered, spec))
    )
    assert noise < MOST, "plain vLLM itself differs from Hugging Face"
    assert error <= max(8 * noise, MOST)
    unsteered_T = forced(real_oracle, PROMPTS[0], steered[0], None)
    assert np.abs(np.subtract(steered[1], unsteered_T)).max() > 50 * MOST, "steering had no effect to speak of"


def test_neighbours_do_not_show(real: LLM) -> None:
    """Same shapes, other steering beside it: the same bits."""
    mine = SPECS[0]
    seen = {
        json.dumps(run(real, [mine, *others])[0])
        for others in ([None] * 3, [SPECS[1], SPECS[4], None], [SPECS[3], SPECS[0], SPECS[2]])
    }
    assert len(seen) == 1


def test_slots_are_clean_after_their_request(real: LLM) -> None:
    """Unsteered requests in slots that steered ones have just left answer as before, bit for bit."""
    before = run(real, [None] * 8)
    steered = run(real, [SPECS[seed % len(SPECS)] for seed in range(8)])
    after = run(real, [None] * 8)
    assert before == after
    assert all(a != b for a, b in zip(before, steered, strict=True))


def test_silence_is_plain_vllm(real: LLM, smollm2: str, tmp_path: Path) -> None:
    """Against a stock engine in a process of its own, without our plugin."""
    settings = {**SETTINGS, "dtype": "float32", "max_logprobs": 20}
    ids_NM, logprobs_NM = alone(tmp_path, smollm2, settings, PROMPTS, ANSWER, timeout=600)
    for (ids, logprobs), their_ids, theirs in zip(run(real, [None] * 8), ids_NM, logprobs_NM, strict=True):
        assert ids == their_ids.tolist()
        assert np.abs(np.subtract(logprobs, theirs)).max() < MOST
