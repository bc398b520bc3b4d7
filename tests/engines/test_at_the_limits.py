"""Invariant 11, first line: whatever admission accepts stays finite in the engine, and leaves nothing behind.

Each spec is taken to the limit: its sizes grow together until the next step would be refused.
"""

from __future__ import annotations

import base64
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from helpers.driving import generate, sampled, tokens
from helpers.engines import RUNNER, TINY_BLOCKS, VECTORS
from helpers.traffic import Start

from steer_engine import LLM
from steer_engine.errors import SteeringRequestError
from steer_engine.settings import SteeringConfig
from steer_engine.site import SITES_IN_BLOCKS
from steer_engine.vectors.safetensors_format import to_bytes


class Numbers(NamedTuple):
    """How much a run does. every: each so many of the edits that stand alone."""

    plain: int
    mixes: int
    every: int
    sites: bool


FULL = Numbers(plain=300, mixes=64, every=1, sites=True)
FEW = Numbers(plain=4, mixes=2, every=5, sites=False)

NUM_BLOCKS = 24
PROMPT = tokens(7, 40)
SMALLEST, LARGEST = -10.0, 38.5
"""Powers of ten between which a limit is searched."""

SIZED: list[dict[str, Any]] = [
    {"op": "add", "scale": 1.0},
    {"op": "add", "scale": -1.0},
    {"op": "add_relative", "scale": 1.0},
    {"op": "add_relative", "scale": -1.0},
    {"op": "ablate", "scale": 1.0},
    {"op": "ablate", "scale": -1.0},
    {"op": "clamp", "lo": 1.0},
    {"op": "clamp", "hi": -1.0},
    {"op": "set", "target": 1.0},
    {"op": "set", "target": -1.0},
    {"op": "feature", "target": 1.0},
    {"op": "feature", "add": -1.0},
    {"op": "low_rank", "scale": 1.0},
    {"op": "rotate", "degrees": 170},
    {"op": "rotate", "to_degrees": -90},
]
"""Every operation in both directions, at size 1. An angle has no size."""


def inline(residual: float) -> dict[str, str]:
    """Directions in the request itself, with the residual norms that its client claims."""
    vector = VECTORS["r3"].with_metadata(residual_norms=dict.fromkeys(range(TINY_BLOCKS), residual))
    return {"data": base64.b64encode(to_bytes(vector)).decode()}


CLAIMED: list[dict[str, Any]] = [
    {"op": "add_relative", "scale": 1.0, "vector": inline(1e-6)},
    {"op": "ablate", "scale": -1.0, "vector": inline(1e-6)},
    {"op": "add", "scale": 1.0, "unit": "residual", "vector": inline(5.0)},
    {"op": "add", "scale": 1.0, "unit": "residual", "vector": inline(1e6)},
]
"""Norms that would make any edit look small, and norms that are multiplied."""


def named(edit: dict[str, Any], vector: str, blocks: Any) -> dict[str, Any]:
    """With its vector, or the file that its operation needs; features are those of block 1."""
    match edit["op"]:
        case "feature":
            return {**edit, "vector": "jump", "feature": [3, 40], "blocks": 1}
        case "low_rank":
            return {**edit, "vector": "reft", "blocks": blocks}
        case "rotate":
            return {**edit, "vector": vector, "toward": "r31" if vector != "r31" else "r30", "blocks": blocks}
    return {**edit, "vector": vector, "blocks": blocks}


def sized(edit: dict[str, Any], power: float) -> dict[str, Any]:
    return {key: value * 10.0**power if isinstance(value, float) else value for key, value in edit.items()}


def is_accepted(llm: LLM, spec: dict[str, Any]) -> bool:
    try:
        llm.llm_engine.input_processor.steering.resolve(spec)
    except SteeringRequestError:
        return False
    return True


def at_the_limit(llm: LLM, edits: list[dict[str, Any]], **fields: Any) -> dict[str, Any]:
    """The spec with the largest sizes that are accepted, to within 1 %."""
    low, high = SMALLEST, LARGEST
    assert is_accepted(llm, {"edits": [sized(edit, low) for edit in edits], **fields})
    while high - low > 0.004:
        middle = (low + high) / 2
        if is_accepted(llm, {"edits": [sized(edit, middle) for edit in edits], **fields}):
            low = middle
        else:
            high = middle
    return {"edits": [sized(edit, low) for edit in edits], **fields}


def drawn_edits(rng: np.random.Generator, sites: tuple[str, ...]) -> list[dict[str, Any]]:
    """One to four edits of any kind, at all blocks or some, of relative sizes over six orders of magnitude.

    A third of them grow or fade while they apply; a quarter have a gate, a condition, or a site inside the block.
    """
    edits = []
    for _ in range(rng.integers(1, 5)):
        edit = sized(SIZED[rng.integers(len(SIZED))], rng.uniform(-6, 0))
        some = sorted(rng.choice(TINY_BLOCKS, rng.integers(1, TINY_BLOCKS + 1), replace=False).tolist())
        edit = named(edit, f"r{rng.integers(32)}", some)
        if rng.integers(3) == 0 and edit["op"] != "rotate":
            grows = "scale" in edit and edit["op"] != "low_rank"
            edit["schedule"] = {"kind": "linear", "over": 20, "to": 3.0 if grows else 0.5}
        if rng.integers(4) == 0:
            edit["gate"] = {"vector": "r20", "min_cos": -1.0}
        if rng.integers(4) == 0 and edit["blocks"] != [0]:
            edit["when"] = {"vector": "r10", "blocks": [0], "above": -1.0, "at": "mean_prompt"}
        if rng.integers(4) == 0 and edit["op"] in ("add", "add_relative", "ablate", "clamp", "set"):
            edit["site"] = sites[rng.integers(len(sites))]
        edits.append(edit)
    return edits


def specs_at_the_limit(llm: LLM, numbers: Numbers) -> list[dict[str, Any]]:
    """Each operation alone at one block and at all blocks, then random mixes; with and without `preserve_norm`."""
    rng = np.random.default_rng(11)
    is_half = "float16" in str(llm.model_config.dtype).replace("bfloat16", "")
    alone = [[named(edit, "r0", blocks)] for edit in SIZED for blocks in ("all", 1)]
    alone = alone[:: numbers.every] + [[edit] for edit in CLAIMED]
    sites = ("attn", "mlp") if numbers.sites and not is_half else ("block",)
    mixes = [drawn_edits(rng, sites) for _ in range(numbers.mixes)]
    asked = [
        (edits, bool(keep))
        for number, edits in enumerate(alone + mixes)
        for keep in ((False, True) if number < len(alone) else (number % 2,))
    ]
    smallest = [{"edits": [sized(each, SMALLEST) for each in edits], "preserve_norm": keep} for edits, keep in asked]
    # In float16, the bound on growth leaves no room for features whose rows are as long as these.
    possible = [each for each, small in zip(asked, smallest, strict=True) if is_accepted(llm, small)]
    assert len(possible) > (0.6 if is_half else 0.99) * len(asked)
    return [at_the_limit(llm, edits, preserve_norm=keep) for edits, keep in possible]


def all_finite(llm: LLM) -> bool:
    context = llm.llm_engine.engine_core.engine_core.vllm_config.compilation_config.static_forward_context
    caches = [layer.kv_cache for layer in context.values() if hasattr(layer, "kv_cache")]
    assert caches
    return all(bool(torch.isfinite(cache).all()) for cache in caches)


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow_on_v2), "float16"])
def test_what_is_accepted_is_finite_and_leaves_nothing_behind(start: Start, dtype: str) -> None:
    check(start, dtype, FULL if RUNNER == "v1" else FEW)


@pytest.mark.slow
@pytest.mark.v2_only
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_same_in_full_numbers_where_every_kernel_is_interpreted(start: Start, dtype: str) -> None:
    check(start, dtype, FULL)


def check(start: Start, dtype: str, numbers: Numbers) -> None:
    room = SteeringConfig(rows=16, sites=SITES_IN_BLOCKS if numbers.sites else ())
    llm = start(dtype=dtype, num_gpu_blocks_override=NUM_BLOCKS, max_num_seqs=8, steering=room)
    prompts = [tokens(seed, 20 + seed % 30) for seed in range(numbers.plain)]
    fresh = [sampled(output) for output in generate(llm, prompts, [None] * numbers.plain)]
    plain = sampled(generate(llm, [PROMPT], [None], max_tokens=3)[0])
    specs = specs_at_the_limit(llm, numbers)
    outputs = generate(llm, [PROMPT] * len(specs), specs, max_tokens=3, prompt_logprobs=0)
    changed = 0
    for spec, output in zip(specs, outputs, strict=True):
        assert output.outputs[0].finish_reason == "length", spec
        answer = sampled(output)
        assert np.isfinite(answer[1]).all(), spec
        changed += answer != plain
    assert changed > 0.9 * len(specs), "the limits leave room to steer"
    assert llm.steering_status()["ended_non_finite"] == 0
    assert all_finite(llm)
    llm.llm_engine.reset_prefix_cache()
    assert [sampled(output) for output in generate(llm, prompts, [None] * numbers.plain)] == fresh
