"""Drives an `EngineRuntime` step by step, as a model runner does, on the CPU."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from helpers.random_specs import BY_DIGEST, HIDDEN_SIZE, MODEL, resolved
from steer_engine.engine.runtime import EngineRuntime
from steer_engine.engine.stream import StreamForm
from steer_engine.program import Program
from steer_engine.settings import SteeringConfig

MAX_TOKENS = 24


def new_runtime(
    blocks: tuple[int, ...] = MODEL.armed_blocks,
    capture_blocks: tuple[int, ...] = (),
    dtype: torch.dtype = torch.float32,
    **config: Any,
) -> EngineRuntime:
    runtime = EngineRuntime(
        config=SteeringConfig(**{"rows": 8, **config}),
        forms=dict.fromkeys(blocks, StreamForm.SPLIT),
        capture_blocks=capture_blocks,
        hidden_size=HIDDEN_SIZE,
        dtype=dtype,
        device=torch.device("cpu"),
        max_requests=3,
        max_tokens=MAX_TOKENS,
        num_drafts=0,
        use_triton=False,
    )
    for vector in BY_DIGEST.values():
        runtime.store.put(vector)
    return runtime


def program(*edits: dict[str, Any], prompt_len: int = 4, **rest: Any) -> Program:
    return resolved({"edits": [{"vector": "a", **edit} for edit in edits], **rest}).template.at(prompt_len)


def batch(
    *requests: tuple[int, int, int], tokens: Sequence[int] = ()
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, int]:
    """What a step is routed from that has these requests, in row order: (slot or 0, first position, rows).

    tokens: one for each row; 0 everywhere if there are none.
    """
    counts = [count for _, _, count in requests]
    return (
        torch.tensor([0, *np.cumsum(counts)], dtype=torch.int32),
        torch.tensor([slot - 1 for slot, _, _ in requests], dtype=torch.int32),
        torch.cat([torch.arange(first, first + count) for _, first, count in requests]),
        torch.tensor([*tokens] or [0] * sum(counts), dtype=torch.int32),
        sum(counts),
    )


def route(runtime: EngineRuntime, *requests: tuple[int, int, int], tokens: Sequence[int] = ()) -> None:
    """The coming step has these requests: see `batch`."""
    runtime.route(*batch(*requests, tokens=tokens))


def stream(
    dtype: torch.dtype = torch.float32, seed: int = 0, rows: int = MAX_TOKENS
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, carried = (torch.randn(rows, HIDDEN_SIZE, generator=generator).to(dtype) for _ in range(2))
    return hidden, carried


def edited(runtime: EngineRuntime, hidden: torch.Tensor | None, carried: torch.Tensor, site: int = 0) -> torch.Tensor:
    after = carried.clone()
    runtime.edit(hidden, after, site)
    return after


def changed(before: torch.Tensor, after: torch.Tensor) -> list[int]:
    return (before != after).any(-1).reshape(-1).nonzero().squeeze(1).tolist()
