"""The edit algebra in float64 NumPy, with the rounding error that a float32 evaluation may make.

Legend: see `steer_kernels.tables`. Every number carries a bound of its error, propagated by the rules of first-order
error analysis from two facts only: the unit roundoff of the dtypes, and how often one addend is rounded in a sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from steer_kernels.tables import DOT, JUMP, LAST, PLANE, Entry, Tables, decode_entry

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
    measured_SQ: Array
    measured_error_SQ: Array
    probed_TK: Array
    """NaN where nothing is written; [T, 0] without probes."""
    probed_error_TK: Array


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
    number = (_dot if entry.gate_dot else _cosine)(x_D, error_D, bank_RD[entry.gate_row])
    return _within(number, entry.min_cos, entry.max_cos)


def _within(number: _Sum, low: float, high: float) -> tuple[bool, bool]:
    """Whether a number is between two bounds, and whether that is beyond rounding."""
    sure = number.error == 0 or min(abs(number.value - low), abs(number.value - high)) > number.error
    return low <= number.value <= high, sure


def _cosine(x_D: Array, error_D: Array, row_D: Array) -> _Sum:
    """cos(x, row), or 0 if either is zero."""
    dot, norm, length = _dot(x_D, error_D, row_D), _norm(x_D, error_D), _norm(row_D, np.zeros_like(row_D))
    if norm.value == 0 or length.value == 0:
        return _Sum(0.0, 1.0 if norm.error else 0.0)
    cos = dot.value / (norm.value * length.value)
    error = (dot.error / length.value + abs(cos) * norm.error) / norm.value + abs(cos) * length.error / length.value
    return _Sum(cos, error + 4 * U32 * abs(cos))


def _share(entry: Entry, pos: int, first_J: NDArray[np.int32], number_Q: Array, bounds_Q2: Array) -> _Sum:
    """By how much an entry applies at a position that its span covers. 0 with error 0: not at all.

    first_J: where the windows begin that the row is in. number_Q, bounds_Q2: of the conditions of its slot.
    """
    first = entry.start
    if entry.trigger >= 0:
        first = int(first_J[entry.trigger])
        if first > pos:
            return _Sum(0.0, 0.0)
    if entry.exclude >= 0 and first_J[entry.exclude] <= pos:
        return _Sum(0.0, 0.0)
    holds = [low < number < high for number, (low, high) in zip(number_Q, bounds_Q2, strict=True)]
    answers = [held for q, held in enumerate(holds) if entry.conditions >> q & 1]
    if answers and not (any(answers) if entry.any_condition else all(answers)):
        return _Sum(0.0, 0.0)
    since = pos - first
    if not entry.over:
        return _Sum(1.0, 0.0)
    if since >= entry.over:
        return _Sum(entry.to, 0.0)
    change = entry.slope * since
    if not entry.exponential:
        return _Sum(1.0 + change, U32 * (abs(change) + abs(1.0 + change)))
    # The product rounds, which is a factor of the power; ex2.approx is good to 2 ** -22.
    return _Sum(2.0**change, 2.0**change * (np.log(2) * abs(change) + 4) * U32)


def _factor(x_D: Array, error_D: Array, bank_RD: Array, entry: Entry, share: _Sum) -> tuple[_Sum, bool]:
    """share * g(x) with its error, and whether all its comparisons are beyond rounding."""
    dot, norm = _dot(x_D, error_D, bank_RD[entry.row]), _norm(x_D, error_D)
    sure, inner = True, 0.0
    if entry.mode:
        own, dot = dot, _dot(x_D, error_D, bank_RD[entry.read_row])
    if entry.mode == PLANE:
        length = float(np.hypot(own.value, dot.value))
        terms = [entry.c0 * length, entry.c2 * own.value, entry.c3 * dot.value]
        # The length of two numbers changes by at most the length of their errors; squares, sum and root round.
        error = abs(entry.c0) * float(np.hypot(own.error, dot.error)) + abs(entry.c0) * 3 * U32 * length
        error += abs(entry.c2) * own.error + abs(entry.c3) * dot.error
    elif entry.mode == JUMP:
        inside, sure = _within(dot, entry.lo, entry.hi)
        terms = [entry.c0, *([entry.c2 * dot.value, entry.c3] if inside else [])]
        error = abs(entry.c2) * dot.error
    else:
        clipped = float(np.minimum(np.maximum(dot.value, entry.lo), entry.hi)) if entry.c3 else dot.value
        terms = [entry.c0, entry.c1 * norm.value, entry.c2 * dot.value, entry.c3 * (clipped - dot.value)]
        error = abs(entry.c1) * norm.error + (abs(entry.c2) + 2 * abs(entry.c3)) * dot.error
        inner = abs(entry.c3) * error
    # Each term is rounded when it is made (the clip's difference once more) and in at most three sums.
    size = sum(map(abs, terms))
    error += 5 * U32 * (size + inner)
    if entry.over:  # the coefficients are multiplied with the share first
        error = abs(share.value) * error + (share.error + U32 * abs(share.value)) * (size + error)
    return _Sum(share.value * sum(terms), error), sure


class _Measured:
    """What the rows add to the conditions of their slots, on a copy."""

    def __init__(self, tables: Tables) -> None:
        self.total_SQ = to_float64(tables.measured_SQ).copy()
        self.error_SQ = np.zeros_like(self.total_SQ)

    def add(self, slot: int, entry: Entry, number: _Sum) -> None:
        place = (slot, entry.total)
        if entry.largest:
            self.total_SQ[place] = max(self.total_SQ[place], number.value)
            self.error_SQ[place] = max(self.error_SQ[place], number.error)
        else:
            self.total_SQ[place] += number.value
            self.error_SQ[place] += number.error + 2.0**-52 * abs(self.total_SQ[place])


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
    # A launch does not ask a condition that it measures: all of them have the numbers from before.
    number_SQ, bounds_SQ2, windows_TJ = tables.measured_SQ.numpy(), tables.bounds_SQ2.numpy(), tables.windows_TJ.numpy()
    measured = _Measured(tables)
    probed_TK = np.full((len(x_TD), 0 if tables.probed_TK is None else tables.probed_TK.shape[1]), np.nan)
    probed_error_TK = np.zeros_like(probed_TK)

    def now(t: int) -> tuple[Array, Array]:
        """Row t as edited so far, and its error."""
        now_D = x_TD[t] + delta_TD[t]
        return now_D, x_error_TD[t] + error_TD[t] + U32 * np.abs(now_D)

    def write(t: int, entry: Entry) -> None:
        number = (_dot if entry.measure == DOT else _cosine)(*now(t), bank_RD[entry.row])
        probed_TK[t, entry.probe], probed_error_TK[t, entry.probe] = number.value, number.error

    for t in range(len(x_TD)):
        slot, pos = int(tables.slot_T[t]), int(tables.pos_T[t])
        if slot == 0:
            continue
        delta_D, error_D = delta_TD[t], error_TD[t]
        late = []
        group: tuple[Array, Array] | None = None
        for e in range(int(tables.counts_SL[slot, site])):
            entry = decode_entry(tables.entries_SLEW[slot, site, e].numpy())
            if not entry.start <= pos < entry.end:
                continue
            now_D, now_error_D = group or now(t)
            if entry.parallel:
                group = None if entry.parallel == LAST else (now_D, now_error_D)
            if entry.measure and entry.probe < 0:
                number = (_dot if entry.measure == DOT else _cosine)(now_D, now_error_D, bank_RD[entry.row])
                measured.add(slot, entry, number)
                continue
            share = _share(entry, pos, windows_TJ[t], number_SQ[slot], bounds_SQ2[slot])
            if not share.value:
                continue
            if entry.probe >= 0:
                late += [entry] * entry.late
                if not entry.late:
                    write(t, entry)
                continue
            holds, sure = _gate(now_D, now_error_D, entry, bank_RD)
            decided_T[t] &= sure
            if not holds:
                continue
            w_D = bank_RD[entry.row]
            g, sure = _factor(now_D, now_error_D, bank_RD, entry, share)
            decided_T[t] &= sure
            touched_T[t] = True
            delta_D += g.value * w_D
            # The product rounds, then the sum; a step whose delta was 0 rounds once, which this covers.
            error_D += (g.error + U32 * abs(g.value)) * np.abs(w_D) + U32 * np.abs(delta_D)
        if touched_T[t] and tables.keep_norm_S[slot] and not adds_only:
            _keep_norm(x_TD[t], x_error_TD[t], delta_D, error_D)
        for entry in late:
            write(t, entry)
    result_TD = carried + delta_TD
    return Expected(
        x_TD=x_TD,
        x_error_TD=x_error_TD,
        carried_TD=result_TD,
        error_TD=np.where(touched_T[:, None], error_TD + U32 * np.abs(result_TD), 0.0),
        delta_TD=delta_TD,
        touched_T=touched_T,
        decided_T=decided_T,
        measured_SQ=measured.total_SQ,
        measured_error_SQ=measured.error_SQ,
        probed_TK=probed_TK,
        probed_error_TK=probed_error_TK,
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
