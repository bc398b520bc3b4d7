"""Captured answers of mixed traffic, and what the rows of each must be."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from helpers.driving import params
from helpers.oracle import Oracle, stacked
from helpers.traffic import Ask
from steer_engine import LLM

Scope = Literal["generation", "all"]

BOUND = 2e-5
"""Of a float32 row, relative to the largest number of its block: as `test_oracle` has it for rows of a prompt."""


def capture(
    llm: LLM, requested: Sequence[Ask], *, scope: Scope = "generation", after: bool = False, **fields: Any
) -> list[Any]:
    """vLLM's outputs of one batch, each with `captured`."""
    wanted = [params(ask.spec, max_tokens=ask.max_tokens, **fields) for ask in requested]
    return llm.capture_answers([ask.prompt for ask in requested], wanted, scope=scope, after=after)


def assert_rows(
    oracle: Oracle,
    requested: Sequence[Ask],
    outputs: Sequence[Any],
    *,
    scope: Scope = "generation",
    after: bool = False,
) -> None:
    """Every row is that of the oracle, forced through the tokens that were returned, at the row's position.

    The rows of neighbouring positions differ by far more than the bound.
    """
    for ask, output in zip(requested, outputs, strict=True):
        ids = list(output.outputs[0].token_ids)
        start = len(ask.prompt) - 1 if scope == "generation" else 0
        streams = oracle.streams([*ask.prompt, *ids], ask.spec, len(ask.prompt))
        expected_LPD = stacked(streams, after=after)[:, start:-1]
        assert output.captured.shape == expected_LPD.shape, ask
        assert output.captured.dtype == np.float32
        bound_L = BOUND * np.abs(expected_LPD).max(axis=(1, 2))
        assert (np.abs(output.captured - expected_LPD).max(axis=(1, 2)) <= bound_L).all(), ask
        other_P = np.diff([*ask.prompt, *ids][start:-1]) != 0
        steps_LP = np.abs(np.diff(expected_LPD, axis=1)).max(axis=2)[:, other_P]
        assert (steps_LP >= 100 * bound_L[:, None]).all(), ask


def captured_bytes(llm: LLM) -> int:
    """Bytes of rows that the worker keeps."""
    return int(llm.steering_status()["workers"][0]["captured_bytes"])
