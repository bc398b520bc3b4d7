"""Drives an engine in tests: steered parameters, prompts as tokens, outputs as arrays."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from vllm import LLM, SamplingParams

Steering = dict[str, Any] | None

FEW = 8 if os.environ.get("STEER_TEST_RUNNER", "v1") == "v1" else 3
"""Tokens of an answer: a step takes about a second where every kernel is interpreted."""


def edit(vector: str, scale: float = 1.0, **fields: Any) -> dict[str, Any]:
    return {"vector": vector, "scale": scale, **fields}


def steering(*edits: dict[str, Any], **fields: Any) -> dict[str, Any]:
    return {"edits": list(edits), **fields}


def params(spec: Steering = None, **fields: Any) -> SamplingParams:
    """Greedy, with the logprob of every sampled token; `spec` steers."""
    settings: dict[str, Any] = {"temperature": 0.0, "max_tokens": FEW, "logprobs": 1, "ignore_eos": True, **fields}
    if spec is not None:
        settings["extra_args"] = {"steering": spec}
    return SamplingParams(**settings)


def tokens(seed: int, length: int, vocab_size: int = 256) -> list[int]:
    """A random prompt of plain byte tokens."""
    return [int(token) for token in np.random.default_rng(10_000 + seed).integers(0, vocab_size, length)]


def generate(llm: LLM, prompts: Sequence[list[int]], specs: Sequence[Steering], **fields: Any) -> list[Any]:
    """vLLM's outputs of one batch, in order."""
    inputs: Any = [{"prompt_token_ids": prompt} for prompt in prompts]
    return list(llm.generate(inputs, [params(spec, **fields) for spec in specs], use_tqdm=False))


def sampled(output: Any) -> tuple[list[int], list[float]]:
    """Token ids and their logprobs, exactly as the engine gave them."""
    completion = output.outputs[0]
    ids = list(completion.token_ids)
    return ids, [step[token].logprob for token, step in zip(ids, completion.logprobs, strict=True)]


def silent(llm: LLM, prompts: Sequence[list[int]], **fields: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokens [N, M] and float64 logprobs of plain requests."""
    outputs = generate(llm, prompts, [None] * len(prompts), **fields)
    ids, logprobs = zip(*(sampled(output) for output in outputs), strict=True)
    return np.array(ids), np.array(logprobs, dtype=np.float64)


def fill_the_bank(llm: LLM, prompts: Sequence[list[int]], **fields: Any) -> None:
    """Steered requests by vectors r0..r31, which must show, and then a cold prefix cache."""
    specs = [steering(edit(f"r{seed % 32}", 3.0)) for seed in range(len(prompts))]
    steered = generate(llm, prompts, specs, **fields)
    llm.llm_engine.reset_prefix_cache()
    plain = generate(llm, prompts, [None] * len(prompts), **fields)
    assert [sampled(output) for output in steered] != [sampled(output) for output in plain]
    llm.llm_engine.reset_prefix_cache()


def prompt_logprobs(output: Any) -> np.ndarray:
    """float64 [T - 1]: logprob of each prompt token but the first, given the ones before it."""
    pairs = zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
    return np.array([step[token].logprob for token, step in pairs])


def score(llm: LLM, prompts: Sequence[list[int]], specs: Sequence[Steering]) -> list[np.ndarray]:
    """Teacher-forced logprobs of whole token lists, one batch."""
    outputs = generate(llm, prompts, specs, prompt_logprobs=0, max_tokens=1)
    return [prompt_logprobs(output) for output in outputs]


def distribution(output: Any, vocab_size: int, step: int = 0) -> np.ndarray:
    """float64 [V]: the whole distribution (logprobs) of one generated position."""
    logprobs = output.outputs[0].logprobs[step]
    return np.array([logprobs[token].logprob for token in range(vocab_size)])
