"""A soak: thousands of short requests, each steered to a word of its own or not at all, and not one wrong word."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from helpers.driving import edit, params, steering, tokens
from helpers.engines import TINY_BLOCKS
from helpers.traffic import Start
from transformers import AutoModelForCausalLM

from steer_engine import ControlVector
from steer_engine.vectors import VectorMetadata

NUM_WORDS = 40
CONCURRENCY = 64


@pytest.fixture(scope="module")
def words(tiny_llama: str) -> dict[str, tuple[int, ControlVector]]:
    """Name -> token, and the vector that forces it: along the token's row of the head, longer than any stream."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    head_VD, scale_D = model.lm_head.weight.detach(), model.model.norm.weight.detach()
    unit_VD = head_VD * scale_D / (head_VD * scale_D).norm(dim=1, keepdim=True)
    forced_V = (unit_VD * scale_D @ head_VD.T).argmax(1)
    chosen = [token for token in range(len(head_VD)) if forced_V[token] == token][:NUM_WORDS]
    assert len(chosen) == NUM_WORDS
    directions = {token: (1000 * unit_VD[token]).numpy().astype(np.float32) for token in chosen}
    return {
        f"word{token}": (token, ControlVector(directions={TINY_BLOCKS - 1: row_D}, metadata=VectorMetadata()))
        for token, row_D in directions.items()
    }


@pytest.mark.v1_only
@pytest.mark.parametrize("num_requests", [1000, pytest.param(5000, marks=pytest.mark.slow)])
def test_every_request_says_its_word(
    start: Start, words: dict[str, tuple[int, ControlVector]], num_requests: int
) -> None:
    llm = start(max_num_seqs=CONCURRENCY, num_gpu_blocks_override=512, max_num_batched_tokens=512)
    for name, (_, vector) in words.items():
        llm.vectors.add(name, vector)
    names = list(words)
    rng = np.random.default_rng(0)
    different = [tokens(i, 3 + i % 30) for i in range(50)]
    requested = [None if i % 5 == 0 else names[rng.integers(NUM_WORDS)] for i in range(num_requests)]
    lengths = [1 + int(n) for n in rng.integers(4, size=num_requests)]
    inputs = [{"prompt_token_ids": prompt} for prompt in different]
    plain = [list(o.outputs[0].token_ids) for o in llm.generate(inputs, params(max_tokens=4), use_tqdm=False)]
    specs = [None if name is None else steering(edit(name)) for name in requested]
    wanted = [params(spec, max_tokens=n) for spec, n in zip(specs, lengths, strict=True)]
    outputs = llm.generate([inputs[i % 50] for i in range(num_requests)], wanted, use_tqdm=False)
    wrong = 0
    for i, (name, output) in enumerate(zip(requested, outputs, strict=True)):
        # Greedy words of the random model are far enough apart that no batch changes them by its rounding.
        expected = plain[i % 50][: lengths[i]] if name is None else [words[name][0]] * lengths[i]
        wrong += list(output.outputs[0].token_ids) != expected
    assert wrong == 0
    assert len({tuple(output.outputs[0].token_ids) for output in outputs}) > NUM_WORDS
