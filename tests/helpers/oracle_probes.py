"""The numbers of probes, for the oracle: projections of the streams of a Hugging Face model, in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from helpers.oracle import Oracle
from helpers.oracle_when import covered

RELATIVE = 4e-6
"""Of |x| * |v|, or of 1 for a cosine: ten times the largest difference that was seen (4e-7)."""


def expected_numbers(
    oracle: Oracle,
    tokens: Sequence[int],
    spec: dict[str, Any] | None,
    probes: Sequence[dict[str, Any]],
    prompt_len: int,
) -> dict[str, dict[str, tuple[np.ndarray, float]]]:
    """By probe and block: float64 [T], NaN outside the scope; and the bound of an engine's difference from it."""
    sites = {probe.get("site", "block") for probe in probes}
    streams_at = {site: oracle.streams(tokens, spec, prompt_len, site) for site in sites}
    found: dict[str, dict[str, tuple[np.ndarray, float]]] = {}
    for probe in probes:
        vector, streams = oracle.vectors[probe["vector"]], streams_at[probe.get("site", "block")]
        wanted = probe.get("blocks", "all")
        blocks = vector.blocks if wanted == "all" else [wanted] if isinstance(wanted, int) else wanted
        inside_T, _ = covered(probe.get("scope", "generation"), tokens, prompt_len)
        for block in blocks:
            x_TD = streams[block][bool(probe.get("after", False))].double()
            v_D = torch.tensor(vector.directions[block].tolist(), dtype=torch.float64)
            number_T, size = x_TD @ v_D, float(x_TD.norm(dim=1).max() * v_D.norm())
            if probe.get("measure", "cosine") == "cosine":
                number_T, size = number_T / (x_TD.norm(dim=1) * v_D.norm()), 1.0
            numbers = np.where(inside_T.numpy(), number_T.numpy(), np.nan)
            found.setdefault(probe["name"], {})[str(block)] = (numbers, RELATIVE * size)
    return found


def assert_numbers(
    oracle: Oracle,
    prompt: Sequence[int],
    answer: Sequence[int],
    spec: dict[str, Any] | None,
    probes: Sequence[dict[str, Any]],
    told: dict[str, Any],
) -> None:
    """told: `steering` of a choice. Every number of every probe, at every token, is the oracle's."""
    prompt_len = len(prompt)
    expected = expected_numbers(oracle, [*prompt, *answer], spec, probes, prompt_len)
    assert told["probes"].keys() == expected.keys()
    for name, blocks in expected.items():
        assert told["probes"][name].keys() == blocks.keys()
        for block, (number_T, bound) in blocks.items():
            _assert_close(told["probes"][name][block], number_T[prompt_len - 1 : -1], bound, (name, block))
            if not np.isnan(number_T[: prompt_len - 1]).all():
                _assert_close(told["prompt_probes"][name][block], number_T[: prompt_len - 1], bound, (name, block))


def _assert_close(told: Sequence[float | None], expected_N: np.ndarray, bound: float, where: Any) -> None:
    assert len(told) == len(expected_N), where
    told_N = np.array([np.nan if number is None else number for number in told])
    assert (np.isnan(told_N) == np.isnan(expected_N)).all(), (where, told, expected_N)
    difference_N = np.abs(told_N - expected_N)[~np.isnan(expected_N)]
    assert difference_N.max(initial=0.0) <= bound, (where, difference_N.max(), bound)
