"""The edit algebra in float64 NumPy, with the rounding error that a float32 evaluation may make.

Legend: see `steer_kernels.tables`. Every number carries a bound of its error, propagated by the rules of first-order
error analysis from two facts only: the unit roundoff of the dtypes, and how often one addend is rounded in a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from steer_kernels.tables import Entry, Tables, decode_entry

Array = NDArray[np.float64]

U32 = 2.0**-24
# An addend goes through at most this many roundings in a sum over D <= 16384: NumPy adds pairwise in blocks of 128 with
# 8 lanes (16 + 3 + 7), torch in cascades of 16 on 4 levels, a GPU 32 a thread and then a tree (32 + 5 + 4).
SUM_ROUNDINGS = 128
ROUNDOFF = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
# Spacing below the normal range, where the error is absolute. bfloat16 and float32 share their range.
TINY = {torch.float32: 2.0**-149, torch.float16: 2.0**-24, torch.bfloat16: 2.0**-133}


def to_float64(tensor: torch.Tensor) -> Array:
    return tensor.detach().to(torch.float64).numpy()


def store_error(value: Array, error: Array, dtype: torch.dtype, *, ulps: float = 0.5) -> Array:
    """Error after rounding a float32 `value` with `error` to dtype, by `ulps` (0.5 = to nearest, 1 = any neighbour)."""
    return error + 2 * ulps * (ROUNDOFF[dtype] * (np.abs(value) + error) + TINY[dtype])


@dataclass
class Expected:
    """What a launch must leave behind. Errors are before the final rounding to the stream's dtype."""

    x_TD: Array
    """The stream before the edit (what capture reads), and its error."""
    x_error_TD: Array
    carried_TD: Array
    error_TD: Array
    delta_TD: Array
    touched_T: NDArray[np.bool_]
    decided_T: NDArray[np.bool_]
    """False: a gate lies within rounding of its threshold, so that either outcome is right."""


@dataclass
class _Sum:
    value: float
    error: float


def _dot(a_D: Array, a_error_D: Array, b_D: Array) -> _Sum:
    """<a, b> with exact b: the error of a, one rounding a product, SUM_ROUNDINGS a sum."""
    products = np.abs(a_D * b_D)
    error = np.sum(a_error_D * np.abs(b_D)) + (SUM_ROUNDINGS + 1) * U32 * np.sum(products)
    return _Sum(float(np.sum(a_D * b_D)), float(error))


def _norm(a_D: Array, a_error_D: Array) -> _Sum:
    """| |a + e| - |a| | <= |e|; the root halves the relative error of the sum and rounds once."""
    value = float(np.sqrt(np.sum(a_D * a_D)))
    return _Sum(value, float(np.sqrt(np.sum(a_error_D**2))) + ((SUM_ROUNDINGS + 1) / 2 + 1) * U32 * value)


def _gate(x_D: Array, error_D: Array, entry: Entry, bank_RD: Array) -> tuple[bool, bool]:
    """Whether the gate holds, and whether that is beyond rounding."""
    if entry.gate_row < 0:
        return True, True
    gate_D = bank_RD[entry.gate_row]
    dot, norm, length = _dot(x_D, error_D, gate_D), _norm(x_D, error_D), _norm(gate_D, np.zeros_like(gate_D))
    if norm.value == 0 or length.value == 0:
        return entry.min_cos <= 0 <= entry.max_cos, norm.error == 0
    cos = dot.value / (norm.value * length.value)
    error = (dot.error / length.value + abs(cos) * norm.error) / norm.value + abs(cos) * length.error / length.value
    error += 4 * U32 * abs(cos)
    sure = min(abs(cos - entry.min_cos), abs(cos - entry.max_cos)) > error
    return entry.min_cos <= cos <= entry.max_cos, sure


def _factor(x_D: Array, error_D: Array, w_D: Array, entry: Entry) -> _Sum:
    """g(x) with its error."""
    dot, norm = _dot(x_D, error_D, w_D), _norm(x_D, error_D)
    clipped = float(np.minimum(np.maximum(dot.value, entry.lo), entry.hi)) if entry.c3 else dot.value
    shift = clipped - dot.value
    terms = (entry.c0, entry.c1 * norm.value, entry.c2 * dot.value, entry.c3 * shift)
    error = abs(entry.c1) * norm.error + (abs(entry.c2) + 2 * abs(entry.c3)) * dot.error
    # Each term is rounded when it is made (the clip's difference once more) and in at most three sums.
    return _Sum(sum(terms), error + 5 * U32 * (sum(map(abs, terms)) + abs(entry.c3) * error))


def expect(
    hidden_TD: torch.Tensor | None, carried_TD: torch.Tensor, tables: Tables, site: int, *, adds_only: bool = False
) -> Expected:
    """Runs the programs of `tables` at `site` over every row, in float64."""
    bank_RD = to_float64(tables.bank_RD)
    carried = to_float64(carried_TD)
    x_TD = carried if hidden_TD is None else to_float64(hidden_TD) + carried
    x_error_TD = np.zeros_like(x_TD) if hidden_TD is None else U32 * np.abs(x_TD)
    delta_TD, error_TD = np.zeros_like(x_TD), np.zeros_like(x_TD)
    touched_T, decided_T = np.zeros(len(x_TD), dtype=bool), np.ones(len(x_TD), dtype=bool)
    for t in range(len(x_TD)):
        slot, pos = int(tables.slot_T[t]), int(tables.pos_T[t])
        if slot == 0:
            continue
        delta_D, error_D = delta_TD[t], error_TD[t]
        for e in range(int(tables.counts_SL[slot, site])):
            entry = decode_entry(tables.entries_SLEW[slot, site, e].numpy())
            if not entry.start <= pos < entry.end:
                continue
            now_D = x_TD[t] + delta_D
            now_error_D = x_error_TD[t] + error_D + U32 * np.abs(now_D)
            holds, sure = _gate(now_D, now_error_D, entry, bank_RD)
            decided_T[t] &= sure
            if not holds:
                continue
            w_D = bank_RD[entry.row]
            g = _factor(now_D, now_error_D, w_D, entry)
            touched_T[t] = True
            delta_D += g.value * w_D
            # The product rounds, then the sum; a step whose delta was 0 rounds once, which this covers.
            error_D += (g.error + U32 * abs(g.value)) * np.abs(w_D) + U32 * np.abs(delta_D)
        if touched_T[t] and tables.keep_norm_S[slot] and not adds_only:
            _keep_norm(x_TD[t], x_error_TD[t], delta_D, error_D)
    result_TD = carried + delta_TD
    return Expected(
        x_TD=x_TD,
        x_error_TD=x_error_TD,
        carried_TD=result_TD,
        error_TD=np.where(touched_T[:, None], error_TD + U32 * np.abs(result_TD), 0.0),
        delta_TD=delta_TD,
        touched_T=touched_T,
        decided_T=decided_T,
    )


def _keep_norm(x_D: Array, x_error_D: Array, delta_D: Array, error_D: Array) -> None:
    """Rescales x + delta to |x|, in place on delta and its error."""
    edited_D = x_D + delta_D
    edited_error_D = x_error_D + error_D + U32 * np.abs(edited_D)
    before, after = _norm(x_D, x_error_D), _norm(edited_D, edited_error_D)
    if after.value <= after.error:
        error_D[:] = np.inf if after.error else 0.0
        return
    ratio = before.value / after.value
    ratio_error = (before.error + ratio * after.error) / (after.value - after.error) + U32 * ratio
    rescaled_D = edited_D * ratio
    rescaled_error_D = edited_error_D * (ratio + ratio_error) + np.abs(edited_D) * ratio_error
    rescaled_error_D += U32 * np.abs(rescaled_D)
    delta_D[:] = rescaled_D - x_D
    error_D[:] = rescaled_error_D + x_error_D + U32 * np.abs(delta_D)


def rms_norm(x_TD: Array, error_TD: Array, weight_D: Array, epsilon: float) -> tuple[Array, Array]:
    """RMSNorm of x with its error bound, before the rounding to the stream's dtype."""
    hidden_size = x_TD.shape[1]
    square_T1 = (x_TD * x_TD).sum(1, keepdims=True)
    mean_T1 = square_T1 / hidden_size + epsilon
    # |(x + e)^2| - |x|^2 <= 2|x||e| + |e|^2; the squares, their sum, the quotient and the addition round.
    length_T1 = np.sqrt((error_TD**2).sum(1, keepdims=True))
    change_T1 = (2 * np.sqrt(square_T1) * length_T1 + length_T1**2) / hidden_size
    relative_T1 = change_T1 / mean_T1 + (SUM_ROUNDINGS + 3) * U32
    assert (relative_T1 < 0.5).all(), "a row that is mostly rounding error can't be normed"
    scale_T1 = 1 / np.sqrt(mean_T1)
    # 1 / sqrt(1 - r) - 1 <= r for r < 0.5; the root and the quotient round, and so do the two products.
    value_TD = x_TD * scale_T1 * weight_D
    bound_T1 = relative_T1 + 4 * U32
    return value_TD, np.abs(scale_T1 * weight_D) * error_TD * (1 + bound_T1) + np.abs(value_TD) * bound_T1
